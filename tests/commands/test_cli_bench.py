"""``fastdiff bench``: times every operation here, and refuses what it cannot run."""

import pytest
import torch

from fastdiff import cli, ops
from fastdiff.commands import bench


def test_it_prints_every_operation(capsys):
    assert cli.main(["bench", "--batch", "1", "--seconds", "0.001"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(op) for line in lines) for op in ops.__all__)
    for line in lines[2:]:
        assert float(line.split("x ")[0].split()[-1]) > 0, line


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_sides_compute_the_same_shapes(dtype):
    for case in bench.cases(1, dtype, torch.device("cpu")):
        ours, eager = case.ours(), case.eager()
        ours, eager = (out[0] if isinstance(out, tuple) else out for out in (ours, eager))
        statistics = case.op == "norm_coefficients"  # which are float32
        assert ours.dtype == eager.dtype == (torch.float32 if statistics else dtype), case.op
        assert ours.numel() == eager.numel(), case.op


def test_turns_alternate():
    order = []
    calls = (lambda: order.append("a"), lambda: order.append("b"))
    first, second = bench.race(calls, torch.device("cpu"), 1e-9)
    assert len(first) == len(second) == bench.MIN_ROUNDS
    assert order == ["a", "b"] * (bench.MIN_ROUNDS + 2)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--batch", "0"], "must be positive"),
        (["--device", "meta"], "expected cpu or cuda"),
        (["--device", "cuda:99"], "no device 'cuda:99'"),
        (["--device", "nonsense"], "nonsense"),
        (["--seconds", "nan"], "must be positive"),
    ],
)
def test_bad_arguments_are_one_line(args, words, capsys):
    assert cli.main(["bench", *args]) == 2
    assert words in capsys.readouterr().err
