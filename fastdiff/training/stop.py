"""Ways to end a run early that lose nothing: signals and a wall-clock limit."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from fastdiff.ranks import Ranks


class StopRequest:
    """While entered, the first Ctrl-C or SIGTERM only sets ``requested``; a second Ctrl-C raises.

    The trainer finishes its step, saves, and calls ``reraise``. Handlers can only be set in the
    main thread; elsewhere only the time limit works.
    """

    def __init__(self, max_minutes: float = 0.0) -> None:
        self.deadline = time.monotonic() + 60 * max_minutes if max_minutes else None
        self.signal: int | None = None
        self.impatient = False  # a second Ctrl-C came: leave at once, without saving
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            self.impatient = True
            raise KeyboardInterrupt
        self.signal = number

    @property
    def requested(self) -> bool:
        return self.signal is not None or self.out_of_time

    def asked_of(self, ranks: Ranks, failed: bool = False) -> bool:
        """Whether some rank is asked to stop, or has ``failed`` at what it does beside its steps:
        all of them do, after the same step, and in the way that the signal would have it."""
        found = ranks.numbers(int(self.requested or failed), self.signal or 0).amax(0).tolist()
        self.signal = found[1] or self.signal  # one may have come meanwhile
        return bool(found[0])

    @property
    def out_of_time(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def reraise(self) -> None:
        """What the signal would have done: KeyboardInterrupt, or exit with 128 + its number."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is not None:
            raise SystemExit(128 + self.signal)
