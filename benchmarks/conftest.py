"""race: fastdiff and its peers, turn by turn in one run, so that all meet the same machine.

pytest-benchmark times fastdiff; the peers take their turns between its rounds. Medians, ratios,
bytes and the share of the floor go to ``extra_info`` (kept by --benchmark-json), into the results
file (--results) and into the tables after the run. No benchmark fails because of a time.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.ops import backends
from gpu import lines
from harness import results, shapes, summary
from harness.timing import Contender, Inputs, choose_calls, input_sets, turn_type

RESULTS = pytest.StashKey[results.Results]()
BATCHES = {"cpu": (1, 8), "cuda": (1, 8, 32)}
IMAGE_BATCHES = {"cpu": (1, 8), "cuda": (8, 512)}
DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = ("NCHW", "channels_last")
MAX_ROUNDS = 101
COPY = "copy"


@dataclass
class Case:
    """What is compared: the row's names, and the least work that it takes.

    size_bytes: what must move through memory: each input read and each output written once
    (FIELD.md section 6). flops: a nominal count, for the roofline. models: calls in one forward of
    each network. targets: per peer, how many times faster is aimed at.
    """

    op: str
    shape: str
    dtype: torch.dtype
    batch: int
    variant: str = ""
    layout: str = "-"
    direction: str = "forward"
    size_bytes: int = 0
    flops: int = 0
    models: dict[str, int] = field(default_factory=dict)
    targets: dict[str, float] = field(default_factory=dict)

    def names(self) -> dict[str, Any]:
        dtype = str(self.dtype).removeprefix("torch.")
        values = {name: getattr(self, name) for name in results.IDENTITY}
        return {**values, "dtype": dtype}


def pytest_addoption(parser):
    group = parser.getgroup("fastdiff")
    group.addoption("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    group.addoption(
        "--shapes", choices=tuple(shapes.MODELS_OF_CHOICE), default="all", help="see shapes.py"
    )
    group.addoption(
        "--compiled",
        choices=("none", "some", "all"),
        default="some",
        help="where torch.compile of the eager code is a peer (10 s of compilation each)",
    )
    group.addoption("--first", type=int, metavar="N", help="of the chosen cases so many alone")
    group.addoption("--budget", type=float, default=0.1, help="seconds of rounds per case")
    group.addoption(
        "--results",
        nargs="?",
        const="",
        metavar="PATH",
        help="write the rows to this file, by default benchmarks/results/<device>.json",
    )
    group.addoption(
        "--lines", type=Path, metavar="FOLDER", help="append each row to FOLDER/rows.jsonl at once"
    )


def pytest_configure(config):
    config.stash[RESULTS] = results.Results(None, {})


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config, items):
    if config.getoption("first") is not None:
        config.hook.pytest_deselected(items=items[config.getoption("first") :])
        del items[config.getoption("first") :]


def pytest_generate_tests(metafunc):
    config = metafunc.config
    choice = config.getoption("shapes")
    tables = {
        "norm": shapes.norms,
        "rms_norm": shapes.rms_norms,
        "heads": shapes.attention,
        "image": shapes.images,
    }
    for name, table in tables.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, table(choice), ids=str)
    batches = IMAGE_BATCHES if "image" in metafunc.fixturenames else BATCHES
    if "batch_of_device" in metafunc.fixturenames:
        chosen = batches[_device(config).type]
        metafunc.parametrize("batch_of_device", chosen[-1:] if choice == "quick" else chosen)
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
    if "layout" in metafunc.fixturenames:
        metafunc.parametrize("layout", LAYOUTS)


def _device(config) -> torch.device:
    asked = config.getoption("device")
    return torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    return _device(request.config)


@pytest.fixture
def on_cpu(device) -> None:
    if device.type != "cpu":
        pytest.skip("this comparison is made on the CPU; its networks are not moved")


@pytest.fixture
def compiles(request, device) -> Callable[[Any, int], bool]:
    """compiles(shape, batch): whether torch.compile is among the peers."""
    asked = request.config.getoption("compiled")
    largest = (BATCHES[device.type][-1], IMAGE_BATCHES[device.type][-1])

    def answer(shape: Any, batch: int) -> bool:
        some = shape is not None and shapes.meets_compile(shape) and batch in largest
        return asked == "all" or (asked == "some" and some)

    return answer


@pytest.fixture(scope="session")
def recorded(request) -> results.Results:
    """Where rows go: into the file that --results names, else only into the table at the end."""
    config = request.config
    asked, device = config.getoption("results"), _device(config)
    if asked is not None:
        path = Path(asked) if asked else results.default_path(device)
        config.stash[RESULTS] = results.Results(path, results.machine(device))
        config.stash[RESULTS].header |= results.ceilings(device)
    return config.stash[RESULTS]


@pytest.fixture
def race(benchmark, request, recorded):
    """race(case, ours, peers, inputs, more) -> {"peer": how many times faster ours is}.

    ``inputs`` are every contender's arguments, ``more()`` makes another such set (a GPU's calls
    rotate among several, so that its cache holds none). The contender named "copy" gives the
    bandwidth: it clones the first input in its turn, and so meets the same caches. The floor is the
    case's bytes over that bandwidth, or its flops over the matrix product's rate if longer.
    """
    device = _device(request.config)

    def run(
        case: Case,
        ours: Contender,
        peers: list[Contender],
        inputs: Inputs = (),
        more: Callable[[], Inputs] | None = None,
        *,
        rounds: int | None = None,
        reason: str = "",
        extra: dict[str, Any] | None = None,
    ) -> dict[str, float]:
        made = input_sets(inputs, more, device)
        make = turn_type(device)
        turns = {ours.name: make(ours, made)}
        missing = {}
        for peer in peers:
            try:
                turns[peer.name] = make(peer, made)
            except Exception as error:
                if not peer.optional:
                    raise
                missing[peer.name] = " ".join(str(error).split())[:120] or type(error).__name__
        choose_calls(list(turns.values()), device)
        if rounds is None:
            once = sum(turn.estimate * turn.calls for turn in turns.values())
            affordable = int(request.config.getoption("budget") / once)
            rounds = max(3, min(MAX_ROUNDS, affordable)) | 1
        times: dict[str, list[float]] = {name: [] for name in turns}

        def turn(name: str) -> None:
            times[name].append(turns[name]())

        def peers_turn() -> None:
            for name in turns:
                if name != ours.name:
                    turn(name)

        benchmark.group = " ".join(filter(None, (case.op, case.variant, case.shape)))
        benchmark.pedantic(turn, args=(ours.name,), setup=peers_turn, rounds=rounds)
        row = _row(case, ours.name, times, turns, made, recorded.header)
        row |= {"reason": reason, "missing": missing, **(extra or {})}
        benchmark.extra_info |= row
        recorded.add(row)
        if folder := request.config.getoption("lines"):
            lines.write(folder, f"bench_{case.op}", dry=device.type == "cpu", **row)
        return row["times_faster"]

    named = backends.named()
    try:
        yield run
    finally:
        fastdiff.set_backend(named)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _row(
    case: Case,
    ours: str,
    times: dict[str, list[float]],
    turns: dict[str, Any],
    made: list[Inputs],
    header: dict[str, Any],
) -> results.Row:
    medians = {name: statistics.median(values) for name, values in times.items()}
    row: results.Row = {
        **case.names(),
        "ours": ours,
        "rounds": len(times[ours]),
        "calls": turns[ours].calls,
        "timed_by": {name: turn.how for name, turn in turns.items()},
        "threads": torch.get_num_threads(),
        "times_s": {name: value for name, value in medians.items() if name != COPY},
        # Each pair of neighbouring turns gives one ratio.
        "times_faster": {
            name: statistics.median(p / o for p, o in zip(values, times[ours], strict=True))
            for name, values in times.items()
            if name not in (ours, COPY)
        },
        "bytes": case.size_bytes,
        "flops": case.flops,
        "models": case.models,
        "targets": case.targets,
    }
    sdpa = {name: value for name, value in medians.items() if name.startswith("sdpa ")}
    if sdpa:
        row["best_sdpa"] = best = min(sdpa, key=lambda name: sdpa[name])
        row["times_faster"][summary.BEST_SDPA] = row["times_faster"][best]
    if case.flops and "matmul_tflops" in header:
        rate = header["matmul_tflops"][row["dtype"]] * 1e12
        row["percent_of_matmul"] = 100 * case.flops / rate / medians[ours]
    if COPY in medians and case.size_bytes:
        copied = made[0][0]
        bandwidth = 2 * copied.numel() * copied.element_size() / medians[COPY]
        row["gbps"] = case.size_bytes / medians[ours] / 1e9
        row["copy_gbps"] = bandwidth / 1e9
        row["floor_s"] = case.size_bytes / bandwidth
        if case.op == "attention" and "matmul_tflops" in header:
            rate = header["matmul_tflops"][row["dtype"]] * 1e12
            row["floor_s"] = max(row["floor_s"], case.flops / rate)
        row["percent_of_floor"] = 100 * row["floor_s"] / medians[ours]
    assert all(math.isfinite(value) and value > 0 for value in medians.values())
    return row


def pytest_sessionfinish(session):
    session.config.stash[RESULTS].save()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    recorded = config.stash[RESULTS]
    rows = recorded.measured
    others = summary.others_as_text(rows)
    if others:
        terminalreporter.section("fastdiff, peer, times faster (median of neighbouring pairs)")
        terminalreporter.write_line(others)
    operations = [row for row in rows if row["op"] in summary.OPERATIONS]
    if operations:
        terminalreporter.section("operations: times faster than eager, and share of the floor")
        terminalreporter.write_line(summary.as_text(operations, _device(config).type))
    notes = {f"{row['op']}: {name}: {why}" for row in rows for name, why in row["missing"].items()}
    if notes:
        terminalreporter.write_line("\n".join(f"left out, {note}" for note in sorted(notes)))
    if recorded.path is not None and rows:
        terminalreporter.write_line(f"written: {recorded.path} ({len(recorded.rows())} rows)")
