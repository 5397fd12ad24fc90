"""A pytest plugin: tests marked any_backend make their tensors on the GPU (``make gpu``)."""

import torch

torch.set_default_device("cuda")
