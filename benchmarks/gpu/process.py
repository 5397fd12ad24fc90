"""A phase's process: in a group of its own, its output in the log, ended when its time is over."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gpu.places import ROOT
from gpu.plan import STOP_S, Phase


@dataclass(frozen=True)
class Outcome:
    name: str
    result: str  # "ok", "failed (exit 2)", "cut after 60 s", "left out: …", "not started: …"
    seconds: float = 0.0

    @property
    def is_failure(self) -> bool:
        return not self.result.startswith(("ok", "left out"))


class Running:
    """A phase that has been started."""

    def __init__(self, phase: Phase, limit_s: float, log: Path, environment: Mapping[str, str]):
        self.phase, self.limit_s, self.log = phase, limit_s, log
        self.start = time.monotonic()
        self.offset = log.stat().st_size if log.exists() else 0
        self.error: OSError | None = None
        self.process: subprocess.Popen | None = None
        command = phase.within(limit_s)
        with log.open("ab") as output:
            output.write(f"\n=== {phase.name}: {' '.join(command)}\n".encode())
            output.flush()
            try:
                self.process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=_with(environment, phase.environment),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=_listen_to_interrupts,
                )
            except OSError as error:
                self.error = error

    def wait(self, most_s: float = float("inf")) -> Outcome:
        """How it ended; at its limit, or after ``most_s`` from now, it is ended."""
        if self.process is None:
            return Outcome(self.phase.name, f"failed ({self.error})")
        left = min(self.start + self.limit_s - time.monotonic(), most_s)
        try:
            code = self.process.wait(max(left, 0))
            result = "ok" if code == 0 else _failure(code)
        except subprocess.TimeoutExpired:
            cut = f"cut after {time.monotonic() - self.start:.0f} s"
            result = f"ok: {cut}" if self.phase.spare else cut
        finally:
            self.end()
        return Outcome(self.phase.name, result, time.monotonic() - self.start)

    def end(self) -> None:
        """End the group, whatever of it still runs. First it is interrupted, as by Ctrl-C: Python
        then says where it was, and pytest prints and saves what it has."""
        assert self.process is not None
        if self.process.poll() is None:
            self._signal(signal.SIGINT)
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                pass
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, sign: signal.Signals) -> None:
        assert self.process is not None
        try:
            os.killpg(self.process.pid, sign)
        except ProcessLookupError:
            pass

    def last_lines(self, count: int = 12) -> str:
        """Of what it, and what ran beside it, wrote into the log."""
        with self.log.open("rb") as log:
            log.seek(self.offset)
            return "\n".join(log.read().decode(errors="replace").splitlines()[-count:])


def _with(environment: Mapping[str, str], more: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """NAME+ adds to a search path."""
    merged = dict(environment)
    for name, value in more:
        path = name.removesuffix("+")
        merged[path] = os.pathsep.join([merged[path], value]) if name != path else value
    return merged


def _failure(code: int) -> str:
    if code < 0:
        return f"failed (killed by {signal.Signals(-code).name})"
    return f"failed (exit {code})"


def _listen_to_interrupts() -> None:
    """In the child: a shell starts what it runs in the background deaf to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
