"""What ``accelerate`` did to a model."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Part:
    """A module of the model: its name there, its class, and how it is fused or why it is not."""

    name: str
    kind: str
    how: str


@dataclass
class Report:
    """``str()`` of it is a table, one line for each kind of module.

    replaced: what runs on fused operations now, and on which.
    left: blocks with a norm or attention, and attention, that were left as they are, and why.
    others: norms and attention that fastdiff has no operation for, LayerNorm for one.
    error: of ``verify``: the largest difference of the outputs over the largest output.
    """

    model: str
    replaced: list[Part] = field(default_factory=list)
    left: list[Part] = field(default_factory=list)
    others: list[Part] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)
    error: float | None = None

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.replaced)} modules fused, {len(self.left)} left"]
        lines += [f"  {setting}" for setting in self.settings]
        for title, parts in (("fused", self.replaced), ("left", self.left), ("other", self.others)):
            counted = Counter((part.kind, part.how) for part in parts)
            first = {(part.kind, part.how): part.name for part in reversed(parts)}
            for (kind, how), count in counted.items():
                lines.append(f"  {title} {count:3} {kind} ({first[kind, how]} …): {how}")
        if self.error is not None:
            lines.append(f"  outputs differ by {self.error:.1e} of the largest")
        return "\n".join(lines)
