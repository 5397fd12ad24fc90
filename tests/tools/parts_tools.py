"""``fastdiff sample`` on a small checkpoint, in this process and in others that may be killed."""

import errno
import itertools
import multiprocessing
import os
import signal
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed import TCPStore

from fastdiff.checkpoints.checkpoint import save
from fastdiff.cli import COMMANDS, main, module_of
from fastdiff.models.ema import EMA
from fastdiff.models.unet import UNet
from fastdiff.process.gaussian import create_diffusion
from fastdiff.sampling.sampler import Sampler
from patience import WAIT

# Six batches: numbers 5 … 8, 9 … 12, and so on; the last has two images.
SMALL = ["--num", "22", "--batch-size", "4", "--first-sample", "5", "--steps", "3"]
STARTS = [5, 9, 13, 17, 21, 25]


def save_network(folder: Path, seed: int, spoiled: bool = False) -> Path:
    torch.manual_seed(seed)
    model = UNet(1, 32, 1, 1, (), channel_mult=(1, 1), num_classes=3, null_class=True, image_size=8)
    for parameter in model.parameters():  # the last layer starts at zero
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    if spoiled:
        nn.init.constant_(model.out[2].bias, float("nan"))
    diffusion = create_diffusion(steps=100, noise_schedule="cosine")
    info = {"image_size": [8, 8], "class_names": ["ant", "bee", "cat"]}
    return save(folder, model, diffusion=diffusion, ema=EMA(model, (0.9,)), info=info)


def arguments(checkpoint: Path, out: Path, *options: str) -> list[str]:
    places = ["--checkpoint", str(checkpoint), "--out", str(out)]
    return ["sample", *places, "--device", "cpu", *options]


def sample(checkpoint: Path, out: Path, *options: str) -> int:
    return main(arguments(checkpoint, out, *options))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def part(out: Path, number: int, kind: str = "part") -> Path:
    return out / "parts" / f"{kind}_{number:08d}.npz"


def error_line(printed: str) -> str:
    (line,) = [line for line in printed.splitlines() if line.startswith("fastdiff sample: error: ")]
    return line


def count_drawn(monkeypatch) -> list[int]:
    """The numbers of the first images of the batches that are drawn from now on, in turn."""
    numbers = []
    draw = Sampler.sample

    def counted(self, shape, **options):
        numbers.append(options["first_sample"])
        return draw(self, shape, **options)

    monkeypatch.setattr(Sampler, "sample", counted)
    return numbers


def interrupt(checkpoint, out, number, *options):
    """Run until the batch that starts with this number, and end there as Ctrl-C does."""
    draw = Sampler.sample

    def interrupted(self, shape, **arguments):
        if arguments["first_sample"] == number:
            raise KeyboardInterrupt
        return draw(self, shape, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "sample", interrupted)
        assert sample(checkpoint, out, *SMALL, *options) == 130


def torchrun(argv: list[str], *options: str) -> list[str]:
    """The command that starts two processes of ``fastdiff`` with ``argv``."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", *options]
    return [*launcher, "--nproc-per-node", "2", "-m", "--", "fastdiff", *argv]


def children(pid: int) -> list[int]:
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for text in lists for child in text.read_text().split()]


def forkserver():
    """Processes that need not import everything again."""
    context = multiprocessing.get_context("forkserver")
    # Beside the commands what a run imports as it goes: four of the seven seconds of a short one.
    later = ["torch._dynamo", "torch.distributed.fsdp", "matplotlib.pyplot"]
    context.set_forkserver_preload([*map(module_of, COMMANDS), *later])
    return context


def process(argv, log, environment, disk_full=False, dies_at=None, fault=None):
    """What a process of its own runs: the command line."""
    torch.set_num_threads(1)
    os.environ.update(environment)
    if disk_full:

        def no_room(*args):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        np.savez = no_room
    if dies_at is not None:
        replace, calls = os.replace, itertools.count(1)

        def counted(*args):
            if next(calls) == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*args)

        os.replace = counted
    if fault is not None:
        from rank_faults import spoil

        spoil(fault)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = argv() if callable(argv) else main(argv)
    sys.stdout.flush()
    os._exit(code)


class Group:
    """Processes with the environment torchrun makes, and its store, but started in no time."""

    def __init__(
        self,
        context,
        folder,
        count,
        argv,
        disk_full=None,
        fault=None,
        after=None,
        store_lost=False,
    ):
        """``argv``: of all processes, or a list with each one's; or a function to call instead.
        ``fault``: (rank, its name). ``after``: the group in whose place torchrun starts this one;
        ``store_lost``: the machine is gone whose store that one met at.
        """
        self.log = folder / "log"
        self.job = uuid.uuid4().hex if after is None else after.job
        if after is None or store_lost:
            self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        else:
            self.store = after.store
        self.processes = []
        for rank in range(count):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self.store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RUN_ID": self.job,
            }
            each = not callable(argv) and isinstance(argv[0], list)
            own = argv[rank] if each else argv
            spoiled = fault[1] if fault is not None and fault[0] == rank else None
            target = (own, str(self.log), environment, rank == disk_full, None, spoiled)
            self.processes.append(context.Process(target=process, args=target))
            self.processes[-1].start()

    def finish(self):
        """(exit codes, what all printed)"""
        for one in self.processes:
            one.join(WAIT)
            assert one.exitcode is not None, "a process hangs"
        return [one.exitcode for one in self.processes], self.log.read_text()

    def kill(self):
        for one in self.processes:
            one.kill()
            one.join()
