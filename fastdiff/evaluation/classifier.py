"""A small image classifier that has never seen a sample: the judge of the samples."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.evaluation.threads import one_thread
from fastdiff.images import to_float
from fastdiff.ranks import ALONE, Ranks

MEMBERS = 4
HIDDEN = 16  # features of one member, of the layer before the last
BATCH = 128
HELD_OUT = 5  # one image in so many
ONE_THREAD_SIDE = 16  # images up to this side make layers too short to share out


class Classifier:
    """A committee of convolutional networks whose probabilities are averaged.

    One network alone is 0.9 sure of pure noise (digits, measured), the committee 0.7: members
    that learned from different starts disagree about what none of them has seen.

    Args:
        members: networks of uint8 images scaled to [-1, 1], whose last layer gives the logits.
        held_out: indices of the labelled images that training did not use.
        ranks: the processes that share the images, all of which ask at once.
    """

    def __init__(
        self, members: list[nn.Sequential], held_out: np.ndarray, ranks: Ranks = ALONE
    ) -> None:
        self.members = members
        self.held_out = held_out
        self.ranks = ranks

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, np.ndarray]:
        """uint8 (n, C, H, W) -> probabilities (n, K) on the CPU, hidden features (n, D) float64."""
        with one_thread(max(images.shape[2:]) <= ONE_THREAD_SIDE):
            seen = self.ranks.each(self._see, images.split(256))
        probabilities, features = zip(*seen, strict=True)
        return torch.cat(probabilities), torch.cat(features).numpy()

    def _see(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = to_float(images.to(next(self.members[0].parameters()).device))
        hidden = [member[:-1](x) for member in self.members]
        logits = [member[-1](h) for member, h in zip(self.members, hidden, strict=True)]
        probabilities = torch.stack(logits).softmax(-1).mean(0)
        return probabilities.cpu(), torch.cat(hidden, dim=1).double().cpu()


def train_classifier(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    seed: int = 0,
    steps: int | None = None,
    device: torch.device | str = "cpu",
    ranks: Ranks = ALONE,
) -> Classifier:
    """Train on four fifths of uint8 ``images`` (N, C, H, W) with int64 ``labels`` (N,).

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,), in 0 … num_classes − 1.
        num_classes: K, the classes of the answer.
        seed: the same one gives the same classifier on the same kind of machine.
        steps: of each member; by default 20 passes over the data, at least 200 and at most 500.
        device: where it is trained.
        ranks: the processes that share the members, all of which get all of them.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held_out, kept = order[: len(images) // HELD_OUT], order[len(images) // HELD_OUT :]
    if steps is None:
        steps = min(max(20 * len(kept) // BATCH, 200), 500)
    x, y = images[kept], labels[kept]
    with one_thread(max(images.shape[2:]) <= ONE_THREAD_SIDE):
        members = ranks.each(
            lambda m: _train_member(x, y, num_classes, steps, m, torch.device(device)).cpu(),
            range(seed * MEMBERS, (seed + 1) * MEMBERS),
        )
    members = [member.to(device) for member in members]
    return Classifier(members, held_out.sort().values.numpy(), ranks)


def _train_member(
    images: Tensor, labels: Tensor, num_classes: int, steps: int, seed: int, device: torch.device
) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network(images.shape[1], max(images.shape[2:]), num_classes).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    for _ in range(steps):
        batch = torch.randint(len(images), (BATCH,), generator=generator)
        x = to_float(_shift(images[batch], generator).to(device))
        loss = F.cross_entropy(network(x), labels[batch].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def _network(channels: int, side: int, num_classes: int) -> nn.Sequential:
    """Convolutions down to 4x4, a hidden layer, and the logits as the last module."""

    def convolution(before: int, after: int, stride: int) -> list[nn.Module]:
        return [
            nn.Conv2d(before, after, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        ]

    width = 16
    layers = convolution(channels, width, 1 if side <= 8 else 2)
    side = side if side <= 8 else -(-side // 2)
    while side > 8:
        layers += convolution(width, min(2 * width, 64), 2)
        width, side = min(2 * width, 64), -(-side // 2)
    layers += convolution(width, 2 * width, 2) + convolution(2 * width, 2 * width, 1)
    layers += [nn.AdaptiveAvgPool2d(4), nn.Flatten()]
    hidden = [nn.Linear(2 * width * 16, HIDDEN), nn.ReLU()]
    return nn.Sequential(*layers, *hidden, nn.Linear(HIDDEN, num_classes))


def _shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image by up to a sixteenth of its side (at least a pixel), edges repeated."""
    count, _, height, width = images.shape
    reach = max(1, max(height, width) // 16)
    down, right = torch.randint(-reach, reach + 1, (2, count, 1, 1), generator=generator)
    rows = (torch.arange(height)[:, None] + down).clamp(0, height - 1)  # (n, H, 1)
    columns = (torch.arange(width) + right).clamp(0, width - 1)  # (n, 1, W)
    return images[torch.arange(count)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)
