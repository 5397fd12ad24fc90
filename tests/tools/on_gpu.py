"""A pytest plugin: tests marked any_backend make their tensors on the GPU (``make gpu-full``)."""

import torch

torch.set_default_device("cuda")
