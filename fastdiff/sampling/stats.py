"""Where the time of a sampler's last call went."""

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

PARTS = ("network", "update")  # of "sampling"


@dataclass
class Stats:
    """Of the last call of ``sample`` or ``iterate``.

    ``seconds``: wall time by phase. "prepare" (weights, x_T, tables), "capture" (warm-up, CUDA
    graph and the comparison with eager) and "sampling" (all steps) add up to the call. Of
    "sampling", "network" and "update" are parts on a CPU; a GPU works them off unseen.
    ``steps``, ``images``: how many; ``steps_per_second``, ``images_per_second`` of "sampling".
    ``compile_seconds``: the first run of a compiled network for each form of x, in all calls of
    this sampler.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    images: int = 0
    compile_seconds: float = 0.0
    compiled: set[tuple] = field(default_factory=set)
    splits: bool = True  # whether "network" and "update" can be timed

    @property
    def steps_per_second(self) -> float:
        return self._rate(self.steps)

    @property
    def images_per_second(self) -> float:
        return self._rate(self.images)

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in self.seconds.items())
        rates = f"{self.steps_per_second:.3g} steps/s, {self.images_per_second:.3g} images/s"
        return f"{self.images} images, {self.steps} steps: {rates} ({phases})"

    def begin(self, images: int, splits: bool) -> "Stats":
        """The figures of a call that begins, which this object shows until the next one does: a
        call in another thread counts for itself."""
        call = Stats(
            images=images,
            splits=splits,
            compile_seconds=self.compile_seconds,
            compiled=self.compiled,
        )
        self.__dict__ = call.__dict__
        return call

    def compiling(self, network: Any, x: Any, *arguments: Any) -> Any:
        """network(x, …); what torch.compile makes anew for x's form counts as compiling."""
        form = (x.shape, x.dtype, x.stride())
        if not network.compiles or form in self.compiled:
            return network(x, *arguments)
        started = time.perf_counter()
        result = network(x, *arguments)
        self.compiled.add(form)
        self.compile_seconds += time.perf_counter() - started
        return result

    @contextmanager
    def phase(self, name: str):
        """A block whose time is added to ``seconds``, unless it cannot be timed here."""
        if name in PARTS and not self.splits:
            yield
            return
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def _rate(self, count: int) -> float:
        seconds = self.seconds.get("sampling", 0.0)
        return count / seconds if seconds else 0.0
