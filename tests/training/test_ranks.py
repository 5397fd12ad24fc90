"""Training by several processes gives what one gives, and ends as one does when one of them fails.

gloo's processes on CPUs, started as torchrun starts them.
"""

import functools
import itertools
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from fastdiff.checkpoints.run_directory import list_checkpoints
from fastdiff.cli import main
from fastdiff.errors import LostRank
from fastdiff.ranks import Ranks
from parts_tools import children, torchrun
from paths import ROOT, TOOLS
from patience import WAIT
from rank_programs import train_diffusers_unet
from rank_runs import SAME, assert_same_run, command, only_line, step_of, wait_for
from training_tools import read_lines


@pytest.mark.seconds
@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("count", "options"),
    [
        (2, []),
        (4, ["--microbatch", "1", "--async-save"]),
        (2, ["--shard", "--async-save"]),
        (4, ["--shard", "--microbatch", "1"]),
        (2, ["--timestep-sampler", "loss-second-moment", "--diffusion-steps", "2"]),
    ],
)
def test_ranks_give_the_curve_of_one(cifar, alone, start, tmp_path, count, options):
    expected = alone
    if options[:1] == ["--timestep-sampler"]:
        expected = tmp_path / "alone"
        assert main(command(cifar, expected, *options)) == 0
    run = tmp_path / "run"
    codes, log = start(count, command(cifar, run, *options)).finish()
    assert codes == [0] * count, log
    assert_same_run(run, expected)
    assert log.count("6 steps done, 0 left") == 1 and log.count("50 images") == 1


@pytest.mark.seconds
@pytest.mark.sample(1)
@pytest.mark.parametrize("shard", [False, True])
def test_ranks_give_a_diffusers_network_the_curve_of_one(start, tmp_path, shard):
    alone, run = str(tmp_path / "alone"), str(tmp_path / "run")
    assert train_diffusers_unet(alone) == 0
    codes, log = start(2, functools.partial(train_diffusers_unet, run, shard)).finish()
    assert codes == [0, 0], log
    assert_same_run(Path(run), Path(alone))


@pytest.mark.seconds
def test_killed_and_resumed_by_another_number_of_ranks(cifar, alone, start, tmp_path):
    run = tmp_path / "run"
    group = start(4, command(cifar, run, "--steps", "1000000", "--rank-minutes", "0.5"))
    wait_for(lambda: list_checkpoints(run))
    os.kill(group.processes[2].pid, signal.SIGKILL)
    codes, log = group.finish()
    assert codes[2] == -signal.SIGKILL and codes[:2] + codes[3:] == [2, 2, 2], log
    said = [line for line in log.splitlines() if "fastdiff train: error: " in line]
    assert len(said) == 1 and "lost rank 2 of 4" in said[0]

    for path in list_checkpoints(run)[1:]:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    assert [p.name for p in list_checkpoints(run)] == ["step_00000003"]
    codes, log = start(2, command(cifar, run, "--resume", "--steps", "6")).finish()
    assert codes == [0, 0], log
    assert_same_run(run, alone)


@pytest.mark.seconds
@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("--no-shard", "--shard"),
        ("--shard", "--no-shard"),
        ("--shard", "--shard"),
    ],
)
def test_a_run_goes_on_sharded_and_back(cifar, alone, start, tmp_path, before, after):
    run = tmp_path / "run"
    codes, log = start(4, command(cifar, run, "--steps", "4", before)).finish()
    assert codes == [0] * 4, log
    parts = list((list_checkpoints(run)[-1] / "optimizer").glob("*.safetensors"))
    assert len(parts) == (4 if before == "--shard" else 0)
    codes, log = start(2, command(cifar, run, "--resume", "--steps", "6", after)).finish()
    assert codes == [0] * 2, log
    assert_same_run(run, alone)


@pytest.mark.seconds
@pytest.mark.parametrize("told", [0, 1])
def test_a_scheduler_that_stops_one_stops_all(cifar, start, tmp_path, told):
    run = tmp_path / "run"
    group = start(2, command(cifar, run, "--steps", "1000000", "--save-every", "0"))
    wait_for(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text())
    os.kill(group.processes[told].pid, signal.SIGTERM)
    codes, log = group.finish()
    assert codes == [128 + signal.SIGTERM] * 2, log
    assert log.count("stopped; continue with --resume from") == 1
    (saved,) = list_checkpoints(run)
    assert read_lines(run)[-1]["step"] <= step_of(saved)


@pytest.mark.seconds
@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("count", "again", "store_lost"), [(2, 2, False), (1, 1, False), (2, 1, True)]
)
def test_what_torchrun_starts_again_goes_on_where_it_was(
    cifar, alone, start, tmp_path, count, again, store_lost
):
    argv = command(cifar, tmp_path / "run", "--rank-minutes", "0.5")
    first = start(count, argv, fault=(count - 1, "step"))
    codes, log = first.finish()
    assert codes == [2] * count and "no memory for the activations" in only_line(log)
    codes, log = start(again, argv, after=first, store_lost=store_lost).finish()
    assert codes == [0] * again, log
    assert_same_run(tmp_path / "run", alone)
    codes, log = start(again, argv).finish()  # another job
    assert codes == [2] * again and "add --resume to continue the run in it" in only_line(log)


@pytest.mark.seconds
def test_a_forgotten_resume_is_refused_as_often_as_torchrun_tries(cifar, alone, start, tmp_path):
    before = sorted(path.name for path in alone.rglob("*"))
    group = None
    for _ in range(2):  # one attempt after the other
        group = start(2, command(cifar, alone), after=group)
        codes, log = group.finish()
        assert codes == [2, 2] and "add --resume to continue the run in it" in only_line(log)
    assert sorted(path.name for path in alone.rglob("*")) == before


@pytest.mark.long
def test_torchrun_loses_a_process_starts_again_and_is_stopped(cifar, alone, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    argv = torchrun(command(cifar, run, "--steps", "1000000"), "--max-restarts", "1")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (
        log.open("w") as out,
        subprocess.Popen(argv, cwd=ROOT, stdout=out, stderr=out, env=environment) as agent,
    ):
        try:
            wait_for(lambda: list_checkpoints(run))
            lost = children(agent.pid)
            os.kill(lost[1], signal.SIGKILL)
            wait_for(lambda: len(set(children(agent.pid)) - set(lost)) == 2)
            there = list_checkpoints(run)[-1].name
            wait_for(lambda: list_checkpoints(run)[-1].name > there)
            workers = children(agent.pid)
            agent.send_signal(signal.SIGTERM)
            assert agent.wait(WAIT) != 0
        finally:
            agent.terminate()
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    said = log.read_text()
    saved = list_checkpoints(run)[-1]
    assert said.count(f"stopped; continue with --resume from {saved}\n") == 1, said
    steps = [line["step"] for line in read_lines(run)]
    assert steps == list(range(2, steps[-1] + 1, 2)) and steps[-1] <= step_of(saved)
    for mine, theirs in zip(read_lines(run), read_lines(alone), strict=False):
        assert mine == pytest.approx(theirs, rel=SAME)


# What is refused or fails: one line, from one rank, and all end


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "9"], "batch_size is 9, expected a positive multiple of world_size (2)"),
        (["--lr", "0"], "lr is 0.0, expected a positive number"),
        (["--device", "cuda:0"], "--device cuda:0 is one GPU for 2 processes"),
    ],
)
def test_bad_settings_are_said_once(cifar, start, tmp_path, options, message):
    codes, log = start(2, command(cifar, tmp_path / "run", *options)).finish()
    assert codes == [2, 2], log
    assert message in only_line(log)
    assert not list_checkpoints(tmp_path / "run")


def test_a_folder_that_is_no_run_is_refused_once(cifar, start, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    codes, log = start(2, command(cifar, tmp_path / "run")).finish()
    assert codes == [2, 2] and "holds 'thesis.txt'" in only_line(log)


def test_ranks_that_disagree(cifar, start, tmp_path):
    run = tmp_path / "run"
    each = [command(cifar, run), command(cifar, run, "--grad-clip", "0.5")]
    codes, log = start(2, each).finish()
    assert codes == [2, 2]
    message = "the ranks disagree: setting grad_clip is 0.5 on rank 1 and 0.0 on rank 0"
    assert only_line(log).startswith(message)


@pytest.mark.seconds
@pytest.mark.sample(5)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("nan", "the loss or its gradient is not finite at step 5"),
        ("read", "'a.png' cannot be decoded"),
        ("step", "no memory for the activations"),
        ("shape", "x of the batch is (3, 3, 32, 32) torch.uint8 on rank 1 and (4, 3, 32, 32)"),
        ("disk", "No space left on device"),
    ],
)
def test_a_fault_of_one_rank(cifar, alone, start, tmp_path, rank, fault, message):
    if (fault, rank) in (("shape", 0), ("disk", 1)):
        pytest.skip("rank 0 is what the others are compared with, and alone writes")
    run = tmp_path / "run"
    argv = command(cifar, run, "--rank-minutes", "0.5")
    codes, log = start(2, argv, fault=(rank, fault)).finish()
    assert codes == [2, 2], log
    line = only_line(log)
    assert message in line, log
    assert [p.name for p in list_checkpoints(run)][:1] == ["step_00000003"]
    if fault == "disk":
        assert line.endswith("step_00000003")
    if fault == "nan":
        assert "on rank" in line and line.endswith("step_00000003")
    codes, log = start(2, command(cifar, run, "--resume")).finish()
    assert codes == [0, 0], log
    assert_same_run(run, alone)


@pytest.mark.seconds
@pytest.mark.sample(2)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("save", ["--async-save", "--no-async-save"])
def test_a_full_disk_of_one_rank_that_writes_its_part(cifar, start, tmp_path, rank, save):
    run = tmp_path / "run"
    argv = command(cifar, run, "--rank-minutes", "0.5", "--shard", save)
    codes, log = start(2, argv, fault=(rank, "disk")).finish()
    assert codes == [2, 2], log
    line = only_line(log)
    assert f"rank {rank} could not write its part: [Errno 28] No space left on device" in line
    assert line.endswith("step_00000003")
    assert [entry.name for entry in (run / "checkpoints").iterdir()] == ["step_00000003"]


@pytest.mark.seconds
@pytest.mark.sample(1)
@pytest.mark.parametrize("shard", [[], ["--shard"]])
def test_an_overflow_of_one_rank_is_no_step_of_any(cifar, start, tmp_path, shard):
    run = tmp_path / "run"
    options = ["--dtype", "float16", "--microbatch", "1", "--grad-clip", "1", "--log-every", "1"]
    # Small: a CPU's gradients of convolutions take 500 times as long in float16.
    options += ["--image-size", "8", "--batch-size", "4", "--save-every", "1", "--keep", "0"]
    argv = command(cifar, run, *options, *shard)
    codes, log = start(2, argv, fault=(1, "overflow")).finish()
    assert codes == [0, 0], log
    assert [line.get("skipped_steps", 0) for line in read_lines(run)] == [0, 0, 0, 0, 1, 1]
    scales = [line["loss_scale"] for line in read_lines(run)]
    assert scales == [scales[0]] * 4 + [scales[0] / 2, scales[0] / 4]
    saved = [safetensors.torch.load_file(p / "model.safetensors") for p in list_checkpoints(run)]
    same = [all(torch.equal(a[n], b[n]) for n in a) for a, b in itertools.pairwise(saved)]
    assert same == [False, False, False, True, True]


@pytest.mark.seconds
def test_a_rank_that_hangs_is_named(cifar, start, tmp_path):
    run = tmp_path / "run"
    argv = command(cifar, run, "--rank-minutes", "0.1", "--batch-size", "6")
    group = start(3, argv, fault=(1, "hang"))
    for one in (group.processes[0], group.processes[2]):
        one.join(WAIT)
        assert one.exitcode == 2, group.log.read_text()
    group.kill()
    line = only_line(group.log.read_text())
    assert "lost rank 1 of 3 without a word" in line and "longer than 0.1 minutes" in line
    assert "step_0000000" in line


@pytest.mark.parametrize(
    ("agent_store", "left", "speak"),
    [
        ("True", [(2, 0), (3, 1), (4, 0), (5, 1)], [2, 4]),  # the machine of ranks 0 and 1 is gone
        ("False", [(1, 1), (2, 0), (3, 1)], [1, 2]),  # rank 0 is
    ],
)
@pytest.mark.parametrize("answers", [True, False])  # or its machine stands still
def test_one_of_each_machine_speaks_where_the_store_is_gone(
    monkeypatch, agent_store, left, speak, answers
):
    over = threading.Event()

    class Gone:
        def set(self, *args):
            if answers:
                raise RuntimeError("Broken pipe")

        def add(self, *args):
            over.wait(WAIT)
            raise RuntimeError("Broken pipe")

    monkeypatch.setattr("fastdiff.ranks.FAREWELL", 0)
    monkeypatch.setattr("fastdiff.ranks.ANSWER", 0.01)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agent_store)
    heard = []
    for rank, local_rank in left:
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        ranks = Ranks(rank, 6, group=object(), store=Gone())
        with pytest.raises((LostRank, SystemExit)) as caught, ranks.lost():
            raise RuntimeError("gloo: Connection closed by peer")
        if caught.type is LostRank:
            heard.append(rank)
            assert "lost another rank, and with it the store at 10.0.0.1," in str(caught.value)
    over.set()
    assert heard == speak


@pytest.mark.seconds
@pytest.mark.parametrize("shard", [[], ["--shard"]])
def test_grids_and_bits_do_not_depend_on_the_number_of_ranks(cifar, start, tmp_path, shard):
    options = ["--steps", "1", "--sample-every", "1", "--sample-count", "5", "--sample-steps", "3"]
    options += ["--nll-every", "1", "--nll-images", "9", "--nll-steps", "4"]
    runs = [tmp_path / "one", tmp_path / "three"]
    assert main(command(cifar, runs[0], *options, "--batch-size", "6")) == 0
    codes, log = start(3, command(cifar, runs[1], *options, *shard, "--batch-size", "6")).finish()
    assert codes == [0, 0, 0], log
    bits = [read_lines(run)[-1]["bits_per_dim"] for run in runs]
    assert bits[0] == pytest.approx(bits[1], rel=1e-5)
    from PIL import Image

    grids = [np.asarray(Image.open(r / "samples" / "step_00000001.png"), np.int16) for r in runs]
    assert np.abs(grids[0] - grids[1]).max() <= 1


@pytest.mark.seconds
def test_a_users_script_under_torchrun(tmp_path):
    """The Python API joins by itself, and keeps a process group that the script has made."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(TOOLS)!r})\n"
        "import torch.distributed as dist\n"
        "from training_tools import make_trainer\n"
        "from pathlib import Path\n"
        "dist.init_process_group('gloo')\n"
        "assert make_trainer(Path(sys.argv[1]), steps=3).fit() == 3\n"
        "assert dist.is_initialized()\n"
        "dist.destroy_process_group()\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "2", str(script), str(tmp_path / "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["step_00000003"]


PULSE = """
import time
from torch.distributed import TCPStore
from fastdiff import ranks
ranks.PULSE = 0
ranks._begin_pulse(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), 0)
time.sleep(0.1)
"""


@pytest.mark.seconds
def test_a_process_ends_well_while_its_pulse_beats():
    # A daemon that the interpreter ends inside the store aborts the process, more often than not
    # where it is always there.
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", PULSE], cwd=ROOT, capture_output=True)
        assert done.returncode == 0, done.stderr
