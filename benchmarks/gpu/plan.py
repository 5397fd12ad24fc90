"""The two runs: what is run in which order, the most valuable evidence first.

The first shows what works, what breaks and where the time goes; the second, once that is mended,
compares with the peers and runs what is left of the tests.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from gpu.machine import program
from gpu.places import ROOT

STOP_S = 5.0  # from the request to stop to the end of the patience
BUDGET = "BUDGET"  # in a command: the seconds that it is given once it is started
# The seconds that each one's benchmark may take.
OPERATIONS = {
    "group_norm_silu": 40,
    "attention": 30,
    "q_sample": 20,
    "posterior_step": 20,
    "rms_norm_silu": 15,
}
FAILED_CAPTURES = "tests/sampling/test_failed_captures.py"  # both of the first run alone
SAMPLER_TESTS = "tests/sampling/test_sampler_cuda.py"


@dataclass(frozen=True)
class Phase:
    """One command, the seconds it may take, and what it cannot do without (the "has" of import).

    background: it runs beside the others until the first that measures. measures: alone. spare: it
    takes what time there is, and to be cut is no failure. reserved: its time is set aside, so that
    it runs however long the others took.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    needs: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    background: bool = False
    measures: bool = False
    spare: bool = False
    reserved: bool = False

    def within(self, limit_s: float) -> list[str]:
        """The command, told to be done a little before ``limit_s`` is over: the total may have left
        it less than its own limit."""
        budget = f"{max(limit_s - STOP_S, 1):g}"
        return [budget if word == BUDGET else word for word in self.command]


@dataclass(frozen=True)
class Run:
    name: str
    total_s: float
    phases: tuple[Phase, ...]


class Commands:
    """How the phases of a run are called."""

    def __init__(self, out: Path, dry: bool):
        self.out, self.dry = out, dry
        self.patience = 3 if dry else 1  # two cores, perhaps shared, are no sixteen

    def module(self, name: str, limit_s: float, *, phase: str = "", **options) -> Phase:
        """benchmarks/gpu/NAME.py"""
        command = [sys.executable, "-m", f"gpu.{name}", "--out", str(self.out)]
        command += ["--budget", BUDGET, *(["--dry"] if self.dry else [])]
        return Phase(phase or name, tuple(command), limit_s * self.patience, **options)

    def tests(self, name: str, limit_s: float, *arguments: str, **options) -> Phase:
        command = [sys.executable, "-m", "pytest", "-q", "-rs", "--tb=short"]
        command += ["-p", "no:cacheprovider", *arguments]
        needs = ("pytest", *options.pop("needs", ()))
        return Phase(name, tuple(command), limit_s * self.patience, needs=needs, **options)

    def on_gpu(self) -> tuple[str, ...]:
        """Only what a GPU alone shows; in a dry run what else there is."""
        return () if self.dry else ("-m", "cuda")

    def accuracy(self, backend: str, limit_s: float, *needs: str) -> Phase:
        """The first case of each test of the operations that any backend must pass."""
        tools = str(ROOT / "tests" / "tools")
        named = ("FASTDIFF_BACKEND", "" if self.dry else backend)
        plugin = () if self.dry else ("-p", "on_gpu")
        arguments = (*plugin, "--quick", "-m", "any_backend", *_accuracy_suites())
        environment = (named, ("PYTHONPATH+", tools))
        name = f"accuracy_{backend}"
        return self.tests(name, limit_s, *arguments, needs=needs, environment=environment)

    def benchmark(self, operation: str, limit_s: float) -> Phase:
        """An operation over its few most telling shapes in bfloat16, in a process of its own."""
        arguments = ("--shapes", "quick", "--compiled", "none", "-k", "bfloat16")
        dry = ("--device", "cpu", "--budget", "0", "--first", "2")
        arguments += dry if self.dry else ("--device", "cuda", "--budget", "0.05")
        results = ("--benchmark-quiet", "--results", str(self.out / "operations.json"))
        results += ("--lines", str(self.out))
        file = f"benchmarks/bench_{operation}.py"
        return self.tests(f"bench_{operation}", limit_s, *arguments, *results, file, measures=True)

    def sanitizer(self, tool: str, limit_s: float) -> Phase:
        """The kernels' launches alone, without pytest, watched by one of NVIDIA's checkers."""
        plain = self.module("launches", limit_s, phase=tool, needs=("compute-sanitizer",))
        watcher = program("compute-sanitizer")
        if self.dry or watcher is None:
            return plain
        watched = (watcher, "--tool", tool, "--error-exitcode", "9", *plain.command)
        # PyTorch's cache of memory would put one tensor after the other, where an overrun hits no
        # boundary that the checker knows.
        uncached = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
        return replace(plain, command=watched, environment=uncached)


def _accuracy_suites() -> list[str]:
    of = (*OPERATIONS, "named_network", "rng", "elementwise")
    files = {f for name in of for f in (ROOT / "tests" / "ops").glob(f"test_{name}*.py")}
    return sorted(str(file.relative_to(ROOT)) for file in files)


def first(out: Path, dry: bool) -> Run:
    """make gpu-first. The import's limit holds a build of the library; with one at hand it takes
    fifteen seconds."""
    of = Commands(out, dry)
    phases = (
        of.module("first", 120, phase="import"),
        of.module("compile_peers", 150, background=True, spare=True),
        of.module("smoke", 45),
        of.tests("failed_captures", 30, *of.on_gpu(), FAILED_CAPTURES),
        of.tests("sampler_tests", 50, *of.on_gpu(), SAMPLER_TESTS),
        of.module("sampler", 65, measures=True),
        of.module("profile", 30, measures=True),
        of.module("operations", 45, measures=True),
        of.module("ncu", 30, measures=True, needs=("ncu",)),
        of.module("compile_peers", 120, phase="compile_rest", spare=True),
        of.module("caches", 10, reserved=True),
        of.module("report", 10, reserved=True),
    )
    return Run("gpu-first", 295, phases)


def full(out: Path, dry: bool) -> Run:
    """make gpu-full. The compiled peers come from the first run's caches, and nothing runs beside
    them."""
    of = Commands(out, dry)
    apart = [word for file in (FAILED_CAPTURES, SAMPLER_TESTS) for word in ("--deselect", file)]
    phases = (
        of.module("first", 120, phase="import"),
        of.module("compiled", 130, measures=True),
        of.module("eager", 45, measures=True, needs=("diffusers",)),
        of.module("training", 25, measures=True),
        *(of.benchmark(operation, limit_s) for operation, limit_s in OPERATIONS.items()),
        of.accuracy("cuda", 30, "cuda kernels"),
        of.accuracy("triton", 30, "triton"),
        of.sanitizer("memcheck", 45),
        of.sanitizer("racecheck", 45),
        of.tests("cuda_tests", 90, "-m", "cuda", "tests", *apart),
        of.module("report", 10, reserved=True),
    )
    return Run("gpu-full", 420, phases)


RUNS = {"first": first, "full": full}
