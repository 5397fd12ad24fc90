"""What the rows amount to: geometric means, worst cases, the share of the floor, the targets."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

OPERATIONS = ("group_norm_silu", "q_sample", "posterior_step", "attention", "rms_norm_silu")
LARGE = 64e6  # bytes; from here on a GPU's share of the copy bandwidth is judged

# CPU: how many times faster than eager on the geometric mean, and at least on every shape.
TARGETS: dict[tuple[str, str], tuple[float, float]] = {
    ("group_norm_silu", "forward"): (2.0, 0.95),
    ("group_norm_silu", "forward+backward"): (1.6, 0.95),
    ("q_sample", "forward"): (3.0, 3.0),
    ("posterior_step", "forward"): (6.0, 6.0),
    ("attention", "forward"): (1.0, 1.0),
    ("attention", "forward+backward"): (1.0, 1.0),
    ("rms_norm_silu", "forward"): (2.0, 0.95),
}
COMPILED_TARGET = 1.0  # on every shape

# GPU: % of the floor over the large cases; torch.compile's code on the geometric mean; and the
# best of PyTorch's attention kernels on every shape.
GPU_SHARES = {
    ("q_sample", "forward"): 90,
    ("posterior_step", "forward"): 90,
    ("group_norm_silu", "forward"): 85,
    ("group_norm_silu", "backward"): 80,
    ("rms_norm_silu", "forward"): 85,
}
GPU_COMPILED_TARGET = {"group_norm_silu": 1.5}
BEST_SDPA, GPU_SDPA_TARGET = "best sdpa", 1.0


def sdpa_target(head_dim: int) -> float:
    """Of one shape; PyTorch's fast kernels stop at a head_dim of 256."""
    return 1.5 if head_dim > 256 else GPU_SDPA_TARGET


@dataclass(frozen=True)
class Peer:
    """Ours against one peer over a group's rows."""

    mean: float  # geometric, times faster
    least: float
    least_at: str
    count: int


@dataclass(frozen=True)
class Group:
    """The rows of one operation in one dtype, layout and direction."""

    op: str
    dtype: str
    layout: str
    direction: str
    cases: int
    peers: dict[str, Peer]
    floor: float | None  # median % of the floor
    floor_large: float | None  # over the cases of 64 MB and more

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.op, self.dtype, self.layout, self.direction

    def verdict(self, kind: str = "cpu") -> str:
        """What is below its target on a "cpu" or on "cuda", else "ok"."""
        checks = self._gpu_checks() if kind == "cuda" else self._cpu_checks()
        below = [f"{name} < {goal:g}" for name, value, goal in checks if value < goal]
        return ", ".join(below) or "ok"

    def _cpu_checks(self) -> list[tuple[str, float, float]]:
        checks = []
        eager, compiled = self.peers.get("eager"), self.peers.get("compiled")
        if eager and (self.op, self.direction) in TARGETS:
            mean, least = TARGETS[self.op, self.direction]
            checks += [("mean", eager.mean, mean), ("least", eager.least, least)]
        if compiled:
            checks.append(("compiled", compiled.least, COMPILED_TARGET))
        return checks

    def _gpu_checks(self) -> list[tuple[str, float, float]]:
        checks = []
        share = GPU_SHARES.get((self.op, self.direction))
        compiled, sdpa = self.peers.get("compiled"), self.peers.get(BEST_SDPA)
        if share is not None and self.floor_large is not None:
            checks.append(("% floor", self.floor_large, share))
        if compiled:
            goal = GPU_COMPILED_TARGET.get(self.op, COMPILED_TARGET)
            checks.append(("compiled", compiled.mean, goal))
        if sdpa:
            checks.append((BEST_SDPA, sdpa.least, GPU_SDPA_TARGET))
        return checks


def groups(rows: Iterable[Row]) -> list[Group]:
    """One Group for each op × dtype × layout × direction, in the order of the operations."""
    gathered: dict[tuple, list[Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("op", "dtype", "layout", "direction"))
        gathered.setdefault(key, []).append(row)
    order = {op: i for i, op in enumerate(OPERATIONS)}
    made = []
    for key in sorted(gathered, key=lambda k: (order.get(k[0], len(order)), k)):
        members = gathered[key]
        names = dict.fromkeys(name for row in members for name in row["times_faster"])
        shares = [(row["bytes"], row["percent_of_floor"]) for row in members if row.get("floor_s")]
        large = [share for size, share in shares if size >= LARGE]
        made.append(
            Group(
                *key,
                cases=len(members),
                peers={name: _peer(name, members) for name in names},
                floor=statistics.median(share for _, share in shares) if shares else None,
                floor_large=statistics.median(large) if large else None,
            )
        )
    return made


def _peer(name: str, rows: Sequence[Row]) -> Peer:
    ratios = [(row["times_faster"][name], case(row)) for row in rows if name in row["times_faster"]]
    least, at = min(ratios)
    return Peer(statistics.geometric_mean(r for r, _ in ratios), least, at, len(ratios))


def case(row: Row) -> str:
    """The rest of a row's name: "film 128@32 batch 8"."""
    return f"{row['variant']} {row['shape']} batch {row['batch']}".strip()


def backward_rows(rows: Iterable[Row]) -> list[Row]:
    """The backward alone of group_norm_silu, by difference: its floor is 3 passes of the 5."""
    rows = list(rows)
    name = ("op", "variant", "shape", "batch", "dtype", "layout")
    forward = {tuple(r[n] for n in name): r for r in rows if r["direction"] == "forward"}
    derived = []
    for both in rows:
        alone = forward.get(tuple(both[n] for n in name))
        if both["op"] != "group_norm_silu" or both["direction"] == "forward" or alone is None:
            continue
        seconds = both["times_s"][both["ours"]] - alone["times_s"][alone["ours"]]
        floor = both["floor_s"] * 3 / 5
        if seconds <= 0:
            continue
        derived.append(
            {
                **{n: both[n] for n in name},
                "direction": "backward",
                "times_faster": {},
                "bytes": both["bytes"] - alone["bytes"],
                "floor_s": floor,
                "percent_of_floor": 100 * floor / seconds,
            }
        )
    return derived


def per_forward(rows: Iterable[Row], peer: str = "eager") -> dict[tuple, float]:
    """(op, model, batch, dtype, layout, direction) -> how many times faster all the calls of one
    forward of that network are together: Σ count·peer / Σ count·ours. Only whole networks."""
    theirs: dict[tuple, float] = {}
    ours: dict[tuple, float] = {}
    seen: dict[tuple, int] = {}
    for row in rows:
        for model, count in (row.get("models") or {}).items():
            if peer not in row["times_s"]:
                continue
            key = (row["op"], model, *(row[n] for n in ("batch", "dtype", "layout", "direction")))
            theirs[key] = theirs.get(key, 0.0) + count * row["times_s"][peer]
            ours[key] = ours.get(key, 0.0) + count * row["times_s"][row["ours"]]
            seen[key] = seen.get(key, 0) + count
    return {key: theirs[key] / ours[key] for key in theirs if seen[key] == _calls(key[0], key[1])}


def _calls(op: str, model: str) -> int:
    from harness import shapes

    table: Sequence[Any] = shapes.NORMS if op == "group_norm_silu" else shapes.ATTENTION
    return sum(shape.count.get(model, 0) for shape in table)


def as_text(rows: list[Row], kind: str = "cpu", *, brief: bool = False) -> str:
    """The short table after a run; unless ``brief``, also what a whole network gains."""
    rows = [row for row in rows if row["op"] in OPERATIONS]
    every = groups([*rows, *(backward_rows(rows) if kind == "cuda" else [])])
    lines = [
        f"{'operation':16} {'dtype':9} {'layout':13} {'direction':17} {'cases':>5} "
        f"{'mean':>6} {'least':>6} {'vs compiled':>13} {'% floor':>8} {'>64 MB':>6}  target"
    ]
    for group in every:
        eager, compiled = group.peers.get("eager"), group.peers.get("compiled")
        lines.append(
            f"{group.op:16} {group.dtype:9} {group.layout:13} {group.direction:17} "
            f"{group.cases:5} "
            f"{_number(eager and eager.mean):>6} {_number(eager and eager.least):>6}"
            f" {_number(compiled and compiled.mean):>6} {_number(compiled and compiled.least):>6}"
            f" {_number(group.floor, 0):>8} {_number(group.floor_large, 0):>6}"
            f"  {group.verdict(kind)}"
        )
    worst = [(p.least, g, p) for g in every if (p := g.peers.get("eager"))]
    if worst:
        least, group, peer = min(worst, key=lambda item: item[0])
        lines.append(f"worst against eager: {least:.2f}x, {' '.join(group.key)}, {peer.least_at}")
    lines += _below_target(rows)
    if not brief:
        for key, ratio in per_forward(rows).items():
            op, model, batch, dtype, layout, direction = key
            lines.append(
                f"all {op} of one {model} {direction}, batch {batch}, {dtype} {layout}: "
                f"{ratio:.2f}x"
            )
    return "\n".join(lines)


def _below_target(rows: list[Row]) -> list[str]:
    """The cases with a target of their own that do not reach it."""
    return [
        f"below its target {goal:g}: {row['op']} {case(row)} {row['dtype']} {row['layout']} "
        f"{row['direction']}: {ratio:.2f}x over {peer}"
        for row in rows
        for peer, goal in row.get("targets", {}).items()
        if (ratio := row["times_faster"].get(peer)) is not None and ratio < goal
    ]


def others_as_text(rows: list[Row]) -> str:
    """Networks and whole steps: one line per case and peer."""
    lines = []
    for row in rows:
        if row["op"] in OPERATIONS:
            continue
        for peer, ratio in row["times_faster"].items():
            goal = row.get("targets", {}).get(peer)
            mark = "" if goal is None else f"  target {goal:.2f}"
            mark += "" if goal is None or ratio >= goal else ", below"
            ours, theirs = (1e3 * row["times_s"][name] for name in (row["ours"], peer))
            lines.append(
                f"{row['op']:14} {row['shape']:14} {row['dtype']:9} batch {row['batch']:<4} "
                f"{ours:9.2f} ms {theirs:9.2f} ms  {peer:28} {ratio:5.2f}x{mark}"
            )
        if "steps" in row:
            lines.append(_sampling(row))
    return "\n".join(lines)


def _sampling(row: Row) -> str:
    seconds = row["times_s"][row["ours"]]
    said = [
        f"{1e3 * seconds / row['steps']:.2f} ms a step",
        f"{row['batch'] / seconds:.3g} images/s",
    ]
    if "percent_of_matmul" in row:
        said.append(f"{row['percent_of_matmul']:.0f} % of the matrix product's rate")
    if "matrix_product_share" in row:
        share = 100 * row["matrix_product_share"]
        said.append(f"{share:.0f} % of the time in convolutions and matrix products")
    if "psnr_db" in row:
        said.append(f"PSNR to the peer's images {row['psnr_db']:.0f} dB")
    said += [f"{peer} {size:.0f} MB" for peer, size in row.get("peak_mb", {}).items()]
    return "  fastdiff: " + ", ".join(said)


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
