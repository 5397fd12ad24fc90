"""What a GPU is wanted for, in two short runs: see what breaks and where the time goes; compare.

    python -m gpu.run first|full --out FOLDER [--only NAME,…] [--from NAME] [--dry]

It uses the Python that runs it and the packages that one has, and no network. Every phase is a
process that appends what it finds to FOLDER at once: rows.jsonl, log.txt, profiles. One that fails,
hangs or is killed costs itself alone. Exits with 0 when every phase ended well (one that is left
out, for want of a program or a package, does not count), 1 when one did not, 3 without a GPU.
"""

import argparse
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpu import lines
from gpu.places import State
from gpu.plan import RUNS, STOP_S, Phase, Run
from gpu.process import Outcome, Running

LOG = "log.txt"
MOST_FILES = 8


class Runner:
    """Runs phases one after the other, those in the background beside them."""

    def __init__(self, run: Run, out: Path, environment: Mapping[str, str], dry: bool = False):
        self.run, self.out, self.environment, self.dry = run, out, environment, dry
        self.deadline = time.monotonic() + run.total_s
        self.background: list[Running] = []
        self.outcomes: list[Outcome] = []

    def __call__(self) -> list[Outcome]:
        try:
            for index, phase in enumerate(self.run.phases):
                self._step(phase, self.run.phases[index + 1 :])
            self._end_background()
        finally:
            for running in self.background:
                running.end()
        return self.outcomes

    def _step(self, phase: Phase, later: Sequence[Phase]) -> None:
        if phase.measures or phase.reserved:
            self._end_background()
        set_aside = 0.0 if phase.reserved else sum(p.limit_s for p in later if p.reserved)
        left = self.deadline - time.monotonic() - set_aside
        why_not = self._why_not(phase, left)
        if why_not:
            self._note(Outcome(phase.name, why_not))
            return
        limit = min(phase.limit_s, left - STOP_S)
        beside = ", in the background" if phase.background else ""
        print(f"=== {phase.name} (at most {limit:.0f} s{beside})", flush=True)
        running = Running(phase, limit, self.out / LOG, self.environment)
        if phase.background:
            self.background.append(running)
            return
        try:
            self._note(running.wait(), running)
        except BaseException:
            running.end()
            raise

    def _why_not(self, phase: Phase, left_s: float) -> str:
        """Why a phase is not run, in the words of its outcome."""
        if any(o.name == "import" and o.is_failure for o in self.outcomes):
            return "not started: the import failed"
        if left_s <= STOP_S:
            return f"{'left out' if phase.spare else 'not started'}: no time is left"
        missing = [name for name in phase.needs if name not in self._has()]
        if missing and not self.dry:  # without a GPU stand-ins take their place
            return f"left out: {', '.join(missing)} not found here"
        return ""

    def _has(self) -> list[str]:
        """What the last import found."""
        found = [line["has"] for line in lines.read(self.out) if "has" in line]
        return found[-1] if found else []

    def _end_background(self) -> None:
        """Those that measure have the machine for themselves; what was compiled stays compiled."""
        while self.background:
            running = self.background[0]
            outcome = running.wait(0)
            self.background.pop(0)
            if outcome.result.startswith("cut"):
                outcome = Outcome(outcome.name, "ok: stopped for what measures", outcome.seconds)
            self._note(outcome, running)

    def _note(self, outcome: Outcome, running: Running | None = None) -> None:
        self.outcomes.append(outcome)
        seconds = round(outcome.seconds, 1)
        lines.write(
            self.out, outcome.name, run=self.run.name, outcome=outcome.result, seconds=seconds
        )
        print(f"{outcome.name}: {outcome.result}, {seconds:g} s", flush=True)
        if outcome.is_failure and running is not None:
            print(_indented(running.last_lines()), flush=True)


def chosen(run: Run, only: str | None, start: str | None) -> Run:
    """The phases that were asked for, and the import, which the others need. ValueError: an unknown
    name."""
    names = [phase.name for phase in run.phases]
    wanted = only.split(",") if only else names[names.index(start) :] if start in names else names
    unknown = [name for name in [*wanted, *([start] if start else [])] if name not in names]
    if unknown:
        raise ValueError(f"{run.name} has no phase {unknown[0]!r}; it has {', '.join(names)}")
    kept = tuple(p for p in run.phases if p.name in wanted or p.name == "import")
    return Run(run.name, run.total_s, kept)


def tidy(out: Path, most: int = MOST_FILES) -> None:
    """What goes beyond ``most`` files, the smaller ones first, into one archive."""
    files = [path for path in out.rglob("*") if path.is_file()]
    read_first = {out / name for name in (lines.FILE, LOG, "report.md")}
    files.sort(key=lambda path: (path not in read_first, -path.stat().st_size))
    surplus = files[most - 1 :] if len(files) > most else []
    if surplus:
        with tarfile.open(out / f"more-{int(time.time())}.tar.gz", "w:gz") as archive:
            for path in surplus:
                archive.add(path, arcname=path.relative_to(out))
    for path in surplus:
        path.unlink()


def find_gpu() -> str | None:
    """The GPU's name, or None without one (or without PyTorch's means to use it)."""
    try:
        import torch
    except ModuleNotFoundError:
        return None
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", choices=sorted(RUNS))
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--only", metavar="NAME,…", help="these phases (and the import)")
    part.add_argument("--from", dest="start", metavar="NAME", help="this phase and all after it")
    parser.add_argument("--dry", action="store_true", help="on the CPU, with tiny sizes")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments(argv)
    if not given.dry and find_gpu() is None:
        message = "no NVIDIA GPU that PyTorch can use was found here (DRY=1 tries all without one)"
        print(f"make gpu-{given.run}: {message}", file=sys.stderr)
        return 3
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    try:
        run = chosen(RUNS[given.run](out, given.dry), given.only, given.start)
    except ValueError as error:
        print(f"make gpu-{given.run}: {error}", file=sys.stderr)
        return 2
    outcomes = Runner(run, out, State(given.dry).environment(given.dry), given.dry)()
    tidy(out)
    print(f"\n=== {run.name}, in {out}")
    for outcome in outcomes:
        print(f"{outcome.name:24} {outcome.seconds:5.0f} s  {outcome.result}")
    return 1 if any(outcome.is_failure for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
