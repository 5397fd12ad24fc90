"""Small processes and networks that the sampler's tests share."""

import torch
from torch import nn

from fastdiff.models.unet import UNet
from fastdiff.process.gaussian import GaussianDiffusion
from fastdiff.process.schedules import get_named_beta_schedule

SHAPE = (3, 2, 4, 4)


def diffusion(steps=20, schedule="cosine", **types):
    return GaussianDiffusion(get_named_beta_schedule(schedule, steps), **types)


def closed_form(doubled=False):
    """A smooth stand-in for a network, (N, C, ...) → (N, C or 2C, ...)."""

    def model(x, t):
        t = t.view(-1, *(1,) * (x.dim() - 1)).to(x.dtype)
        eps = torch.tanh(x) * (0.6 + 0.4 * torch.cos(t / 7)) + 0.1 * torch.sin(5 * x)
        return torch.cat([eps, torch.sin(3 * x + t / 5)], dim=1) if doubled else eps

    return model


def small_unet(channels, *, model_channels=32, channel_mult=(1,), attention_resolutions=()):
    return UNet(
        in_channels=channels,
        model_channels=model_channels,
        out_channels=channels,
        num_res_blocks=1,
        attention_resolutions=attention_resolutions,
        channel_mult=channel_mult,
    )


class Tiny(nn.Module):
    """A small network with parameters, dropout, and classes of which the last is the null one."""

    def __init__(self, channels=2, classes=3):
        super().__init__()
        self.null_label = classes
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.labels = nn.Embedding(classes + 1, channels)
        # Not the list itself: an attribute whose value changes at a call is a reason to recapture.
        self.note = [].append

    @property
    def seen(self):
        return self.note.__self__

    def forward(self, x, t, y=None):
        self.note((x.dtype, t.dtype, x.shape[0], self.training, x.stride()))
        h = self.drop(torch.tanh(self.conv(x)))
        return h if y is None else h + self.labels(y)[:, :, None, None].to(h.dtype)
