"""A small training run of the command line, by one process or by several, and what it must be."""

import time

import pytest
import safetensors.torch
import torch

from fastdiff.checkpoints.run_directory import list_checkpoints
from patience import WAIT
from training_tools import read_lines

SMALL = (
    "--preset iddpm-cifar10 --model-channels 32 --channel-mult 1 --num-res-blocks 1 "
    "--attention-resolutions none --diffusion-steps 20 --dropout 0 --lr 1e-3 --batch-size 8 "
    "--steps 6 --log-every 2 --save-every 3 --ema 0.9 --ema-sigma-rel 0.1 "
    "--ema-snapshot-every 2 --class-cond --label-dropout 0.3 --flip "
    "--device cpu --quiet --no-tensorboard"
).split()
# Float32 sums in another order: of gradients over ranks, of losses over an interval.
SAME = 2e-5


def command(cifar, run, *options):
    return ["train", "--data", str(cifar), "--out", str(run), *SMALL, *options]


def assert_same_run(run, expected, tolerance=SAME):
    found = read_lines(run)
    assert [line["step"] for line in found] == [line["step"] for line in read_lines(expected)]
    for mine, theirs in zip(found, read_lines(expected), strict=True):
        assert mine == pytest.approx(theirs, rel=tolerance)
    last = [list_checkpoints(r)[-1] for r in (run, expected)]
    assert last[0].name == last[1].name
    stored = [sorted((r / "averages").rglob("*.safetensors")) for r in (run, expected)]
    pairs = list(zip(*stored, strict=True))
    stems = sorted(p.stem for p in last[1].glob("*.safetensors") if p.stem != "trainer")
    for stem in stems:
        pairs.append(tuple(p / f"{stem}.safetensors" for p in last))
    for pair in pairs:
        mine, theirs = map(safetensors.torch.load_file, pair)
        # Adam divides by the gradient: where that is all rounding, as of a bias before a norm, a
        # step may be any step.
        off = torch.cat([(mine[name] - value).abs().flatten() for name, value in theirs.items()])
        assert off.median() < 1e-6 and off.max() < step_of(last[1]) * 1e-3


def wait_for(condition):
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.02)


def step_of(checkpoint):
    return int(checkpoint.name.removeprefix("step_"))


def only_line(log):
    (line,) = [line for line in log.splitlines() if "fastdiff train: error: " in line]
    return line.partition("fastdiff train: error: ")[2]
