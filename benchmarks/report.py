"""Results files -> the tables of docs/benchmarks.md and the roofline plots.

    python benchmarks/report.py [results.json ...]

Without files it takes all of benchmarks/results/, its training/ and its sampling/. The tables
replace what stands between the markers of their kind in that page; the plot of each file of
operations becomes docs/roofline_<file>.png.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import results, summary

ROOT = Path(__file__).parent.parent
# The kinds of tables, by which a page's markers are named.
OPERATIONS = "operations"
TRAINING = "training"  # and the op of the rows of measure_training.py
SAMPLING = "sampling"  # likewise of measure_sampling.py

# Okabe & Ito's colours, told apart with any colour vision; the markers differ too.
STYLE = {
    "group_norm_silu": ("#0072B2", "o"),
    "q_sample": ("#E69F00", "s"),
    "posterior_step": ("#009E73", "^"),
    "attention": ("#CC79A7", "D"),
    "rms_norm_silu": ("#D55E00", "v"),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="default: benchmarks/results/*.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where the plots go")
    args = parser.parse_args(argv)
    folders = (results.FOLDER, results.FOLDER / TRAINING, results.FOLDER / SAMPLING)
    files = args.files or sorted(path for folder in folders for path in folder.glob("*.json"))
    loaded = {path: data for path in files if (data := results.load(path)) is not None}
    if not loaded:
        print(f"no results among {[str(f) for f in files]}", file=sys.stderr)
        return 1
    sections: dict[str, list[str]] = {}
    for path, data in loaded.items():
        if any(row["op"] == TRAINING for row in data["rows"]):
            sections.setdefault(TRAINING, []).append(training_tables(data))
            continue
        if any(row["op"] == SAMPLING for row in data["rows"]):
            sections.setdefault(SAMPLING, []).append(sampling_table(data))
            continue
        if not any(row["op"] in STYLE for row in data["rows"]):  # of the sampler alone
            continue
        plot = args.docs / f"roofline_{path.stem}.png"
        draw_roofline(data, plot)
        print(f"written: {plot}")
        sections.setdefault(OPERATIONS, []).append(table(data))
    for kind, tables in sections.items():
        replace_between_markers(args.page, "\n\n".join(tables), kind)
    print(f"written: {args.page}")
    return 0


def markers(kind: str) -> tuple[str, str]:
    return f"<!-- {kind}: start -->", f"<!-- {kind}: end -->"


def replace_between_markers(page: Path, text: str, kind: str) -> None:
    """Raises ValueError where the markers are not there, once each and in order."""
    first, last = markers(kind)
    content = page.read_text(encoding="utf-8")
    head, start, rest = content.partition(first)
    _, end, tail = rest.partition(last)
    if not (start and end) or first in rest or last in tail:
        raise ValueError(f"{page} must have {first} and then {last}, once each")
    page.write_text(f"{head}{first}\n\n{text}\n\n{last}{tail}", encoding="utf-8")


def table(data: dict[str, Any]) -> str:
    """One device's markdown table."""
    rows = [row for row in data["rows"] if row["op"] in summary.OPERATIONS]
    large = data["kind"] == "cuda"
    share = "% of copy, ≥ 64 MB" if large else "% of copy"
    lines = [
        f"**{caption(data)}**",
        "",
        f"| operation | dtype | layout | direction | mean | least | over compiled | {share} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for group in summary.groups([*rows, *(summary.backward_rows(rows) if large else [])]):
        eager, compiled = group.peers.get("eager"), group.peers.get("compiled")
        floor = group.floor_large if large else group.floor
        cells = [
            *(group.op, group.dtype, group.layout, group.direction),
            _times(eager and eager.mean),
            "–" if eager is None else f"{_times(eager.least)} ({eager.least_at})",
            _times(compiled and compiled.mean),
            "–" if floor is None else f"{floor:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def training_tables(data: dict[str, Any]) -> str:
    """One machine's markdown tables: a row for each preset, and the forms of several processes."""
    tables = [f"**{caption(data)}**", _presets_table(data["rows"])]
    if data["ranks"] > 1:
        tables.append(_forms_table(data["rows"], data["ranks"], data["kind"] == "cpu"))
    return "\n\n".join(tables)


def _presets_table(rows: Sequence[dict[str, Any]]) -> str:
    head = ["preset", "batch", "dtype", "images/s", "GFLOP an image", "TFLOP/s", "% of matmul"]
    cells = [
        [
            *(row["shape"], row["batch"], row["dtype"], _rate(row)),
            *(_three_digits(row["flops_per_image"] / 1e9), _three_digits(row["tflops"])),
            *(f"{row['percent_of_matmul']:.0f}", _others([row])),
        ]
        for row in rows
        if row["variant"] == "preset"
    ]
    return _markdown([*head, "others %"], cells)


def _forms_table(rows: Sequence[dict[str, Any]], count: int, cores: bool) -> str:
    """``cores``: of a CPU, whose threads can be those of one process."""
    head = ["preset", "batch", "dtype", *[f"1 process, {count} threads"] * cores]
    head += ["1 of 1 thread" if cores else "1 GPU", f"{count} apart", f"{count} ranks, DDP"]
    head += ["FSDP2", "efficiency", "DDP / apart", "FSDP2 / apart", *["DDP / threads"] * cores]
    by_form: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_form.setdefault((row["shape"], row["dtype"]), {})[row["variant"]] = row
    cells = []
    for (preset, dtype), forms in by_form.items():
        names = [*["whole"] * cores, "one", "apart", "ddp", "fsdp2"]
        if not forms.keys() >= set(names):
            continue
        rate = {name: forms[name]["images_per_s"] for name in names}
        shares = [rate["ddp"] / (count * rate["one"]), rate["ddp"] / rate["apart"]]
        shares += [rate["fsdp2"] / rate["apart"]]
        shares += [rate["ddp"] / rate["whole"]] if cores else []
        every = [forms[name] for name in names]
        cells.append([preset, every[0]["batch"], dtype, *map(_rate, every)])
        cells[-1] += [*(f"{share:.2f}" for share in shares), _others(every)]
    return _markdown([*head, "others %"], cells)


def sampling_table(data: dict[str, Any]) -> str:
    """One machine's markdown table: in each race fastdiff, its rivals from the fastest on, and the
    floor."""
    head = ["network", "batch", "dtype", "steps", "contender", "ms a call", "least"]
    head += ["fastdiff is faster", "PSNR, dB", "peak MB"]
    cells = []
    for row in data["rows"]:
        case = [row["shape"], row["batch"], row["dtype"], row["steps"]]
        names = sorted(row["times_s"], key=lambda name: (name != row["ours"], row["times_s"][name]))
        for name in names:
            ms = [_three_digits(1e3 * row[field][name]) for field in ("times_s", "least_s")]
            beside = [_times(row["times_faster"].get(name)), f"{row['psnr_db'][name]:.0f}"]
            memory = row.get("peak_mb", {}).get(name)
            megabytes = "–" if memory is None else f"{memory:.0f}"
            cells.append([*case, name, *ms, *beside, megabytes])
        floor = [_three_digits(1e3 * row["floor_s"]), *["–"] * 3]
        cells.append([*case, "*its products alone*", "–", *floor])
    return f"**{caption(data)}**\n\n{_markdown(head, cells)}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def _rate(row: dict[str, Any]) -> str:
    return _three_digits(row["images_per_s"])


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _others(rows: Sequence[dict[str, Any]]) -> str:
    return f"{max(0.0, *(row['others_percent'] for row in rows)):.0f}"


def caption(data: dict[str, Any]) -> str:
    versions = data["versions"]
    software = ["torch " + str(versions["torch"])]
    if data["kind"] == "cuda":
        software += [f"triton {versions['triton']}", f"driver {data['driver']}"]
    else:
        software += [f"{data['isa']} kernels"]
    return f"{data['device']}, {', '.join(software)}, {data['date']}"


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×"


def draw_roofline(data: dict[str, Any], path: Path) -> None:
    """Operations per byte against operations per second: one point per operation and case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in data["rows"] if row["op"] in STYLE and row["bytes"] and row["flops"]]
    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    intensities = [row["flops"] / row["bytes"] for row in rows] or [1.0]
    least, most = min(intensities) / 2, max(intensities) * 2
    copy = data["copy_gbps"]
    peaks = data["matmul_tflops"]
    for op, (colour, marker) in STYLE.items():
        for dtype, fill in (("float32", colour), ("bfloat16", "none")):
            mine = [row for row in rows if row["op"] == op and row["dtype"] == dtype]
            if mine:
                axes.scatter(
                    [row["flops"] / row["bytes"] for row in mine],
                    [row["flops"] / row["times_s"][row["ours"]] / 1e9 for row in mine],
                    s=26,
                    marker=marker,
                    facecolors=fill,
                    edgecolors=colour,
                    linewidths=1.0,
                    alpha=0.8,
                    label=f"{op}, {dtype}",
                )
    ridge = min(most, 1e3 * max(peaks.values()) / copy)
    axes.plot([least, ridge], [copy * least, copy * ridge], color="black", linewidth=1.2)
    axes.annotate(
        f"copy, {copy:.0f} GB/s",
        (least, copy * least),
        xytext=(8, 14),
        textcoords="offset points",
        rotation=30,
        rotation_mode="anchor",
        fontsize=9,
    )
    for (dtype, peak), dashes in zip(peaks.items(), ("--", ":"), strict=False):
        axes.axhline(peak * 1e3, color="grey", linewidth=1.0, linestyle=dashes)
        text = f"matrix product, {dtype}, {peak:.3g} TFLOP/s"
        axes.annotate(
            text, (least, peak * 1e3), xytext=(8, 3), textcoords="offset points", fontsize=8
        )
    axes.set(xscale="log", yscale="log", xlim=(least, most))
    axes.set_xlabel("nominal operations per byte that must move")
    axes.set_ylabel("achieved GFLOP/s")
    axes.set_title(caption(data), fontsize=10)
    axes.grid(True, which="major", linewidth=0.3)
    axes.legend(fontsize=8, loc="lower right", framealpha=0.9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
