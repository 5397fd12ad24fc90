"""A network of published blocks, and what the tests of accelerate ask of one."""

import torch
from torch import nn

import fastdiff
from published_blocks import Network

X, T = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 700])


def network(**options):
    model = Network(**options).eval()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


def replaced(model):
    return {part.name: part.how for part in fastdiff.report(model).replaced}


def assert_close(actual, expected, tolerance=1e-5):
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)
