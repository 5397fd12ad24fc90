"""Results files become the tables, the plot and the verdicts that they should."""

import json
import math

import pytest

import report
from harness import results, shapes, summary

START, END = report.markers(report.OPERATIONS)
HEADER = {
    "format": results.FORMAT,
    "device": "Test CPU, 2 threads",
    "kind": "cpu",
    "isa": "avx2",
    "driver": None,
    "versions": {"torch": "2.13.0", "triton": None},
    "copy_gbps": 20.0,
    "matmul_tflops": {"float32": 0.2, "bfloat16": 0.8},
    "date": "2026-01-02",
}


def row(op="group_norm_silu", eager=2.0, *, size=4 << 20, **changes):
    """Ours takes 1 ms and eager ``eager`` times as long; the floor is half a millisecond."""
    made = {
        "op": op,
        "variant": "silu",
        "shape": "128@32",
        "batch": 8,
        "dtype": "float32",
        "layout": "NCHW",
        "direction": "forward",
        "ours": "native",
        "times_s": {"native": 1e-3, "eager": eager * 1e-3},
        "times_faster": {"eager": eager},
        "bytes": size,
        "flops": 3 * size,
        "floor_s": 5e-4,
        "percent_of_floor": 50.0,
        "models": {},
        "targets": {},
    }
    return {**made, **changes}


def file_with(tmp_path, rows, **header):
    path = tmp_path / "test-cpu.json"
    path.write_text(json.dumps({**HEADER, **header, "rows": rows}))
    return path


def test_groups_have_geometric_means_and_the_worst_case():
    rows = [row(eager=1.0), row(eager=4.0, shape="256@8"), row(eager=3.0, dtype="bfloat16")]
    rows[0]["times_faster"]["compiled"] = 1.5
    bfloat16, float32 = summary.groups(rows)
    assert (bfloat16.dtype, float32.dtype, float32.cases) == ("bfloat16", "float32", 2)
    eager = float32.peers["eager"]
    assert math.isclose(eager.mean, 2.0) and eager.count == 2
    assert (eager.least, eager.least_at) == (1.0, "silu 128@32 batch 8")
    assert float32.peers["compiled"].count == 1
    assert float32.floor == 50.0 and float32.floor_large is None


@pytest.mark.parametrize(
    ("rows", "verdict"),
    [
        ([row(eager=2.0)], "ok"),
        ([row(eager=1.9)], "mean < 2"),
        ([row(eager=9.0), row(eager=0.9)], "least < 0.95"),
        ([row(eager=2.0, times_faster={"eager": 2.0, "compiled": 0.9})], "compiled < 1"),
        ([row("q_sample", 3.1)], "ok"),
        ([row("posterior_step", 5.0)], "mean < 6, least < 6"),
        ([row("attention", 0.9, direction="forward+backward")], "mean < 1, least < 1"),
    ],
)
def test_verdicts_on_a_cpu(rows, verdict):
    (group,) = summary.groups(rows)
    assert group.verdict() == verdict


def test_verdicts_on_a_gpu_judge_large_cases_by_the_copy():
    small, large = row("q_sample"), row("q_sample", size=1 << 27, percent_of_floor=91.0)
    assert summary.groups([small, large])[0].verdict("cuda") == "ok"
    large["percent_of_floor"] = 89.0
    assert summary.groups([small, large])[0].verdict("cuda") == "% floor < 90"
    attention = row("attention", times_faster={"eager": 1.0, summary.BEST_SDPA: 0.9})
    assert summary.groups([attention])[0].verdict("cuda") == "best sdpa < 1"


def test_the_backward_is_what_it_adds_to_the_forward():
    both = row(direction="forward+backward", times_s={"native": 3e-3, "eager": 4e-3}, size=50)
    (backward,) = summary.backward_rows([row(size=20), both])
    assert backward["bytes"] == 30
    assert math.isclose(backward["percent_of_floor"], 100 * (5e-4 * 3 / 5) / 2e-3)


def test_a_network_is_weighed_by_its_calls_and_must_be_whole():
    norms = [norm for norm in shapes.NORMS if "ddpm-cifar10" in norm.count]
    rows = [
        row(
            variant=norm.form,
            shape=str(norm),
            models={"ddpm-cifar10": norm.count["ddpm-cifar10"]},
            times_s={"native": 1.0, "eager": 3.0 if norm.size == 32 else 1.0},
        )
        for norm in norms
    ]
    key = ("group_norm_silu", "ddpm-cifar10", 8, "float32", "NCHW", "forward")
    at_32 = sum(n.count["ddpm-cifar10"] for n in norms if n.size == 32)
    calls = sum(n.count["ddpm-cifar10"] for n in norms)
    assert summary.per_forward(rows)[key] == pytest.approx((calls + 2 * at_32) / calls)
    assert summary.per_forward(rows[1:]) == {}


def test_the_text_names_every_operation_and_what_is_below_its_target():
    rows = [row(op, 7.0) for op in summary.OPERATIONS]
    rows[3]["targets"] = {"eager": 8.0}
    text = summary.as_text(rows)
    assert all(op in text for op in summary.OPERATIONS)
    assert "below its target 8: attention silu 128@32 batch 8" in text
    step = row("unet_forward", 1.2, targets={"eager": 1.5})
    assert "1.20x  target 1.50, below" in summary.others_as_text([step])
    assert summary.others_as_text(rows) == ""


@pytest.mark.seconds
def test_the_report_fills_the_page_and_draws_the_roofline(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    page = tmp_path / "benchmarks.md"
    page.write_text(f"before\n{START}\nold numbers\n{END}\nafter\n")
    rows = [row(op, 2.5, dtype=dtype) for op in report.STYLE for dtype in ("float32", "bfloat16")]
    rows[0]["times_faster"]["compiled"] = 1.25
    path = file_with(tmp_path, [*rows, row("unet_forward")])
    args = [str(path), "--page", str(page), "--docs", str(tmp_path)]
    assert report.main(args) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{START}\n\n**Test CPU, 2 threads, torch 2.13.0, avx2")
    assert text.endswith(f"\n\n{END}\nafter\n")
    assert "old numbers" not in text and "unet_forward" not in text
    cells = "| 2.50× | 2.50× (silu 128@32 batch 8) | 1.25× | 50 |"
    assert f"| group_norm_silu | float32 | NCHW | forward {cells}" in text
    assert text.count("| forward |") == 2 * len(report.STYLE)
    assert (tmp_path / "roofline_test-cpu.png").read_bytes().startswith(b"\x89PNG")
    assert report.main(args) == 0 and page.read_text() == text  # again: the same


def test_a_page_without_markers_and_a_file_of_another_kind_are_refused(tmp_path, capsys):
    page = tmp_path / "benchmarks.md"
    page.write_text(f"{END} {START}")
    with pytest.raises(ValueError, match="once each"):
        report.replace_between_markers(page, "text", report.OPERATIONS)
    other = tmp_path / "plan.json"
    other.write_text('{"rows": []}')
    assert report.main([str(other), "--page", str(page)]) == 1
    assert "no results" in capsys.readouterr().err


def test_the_page_of_benchmarks_has_the_markers():
    text = (report.ROOT / "docs" / "benchmarks.md").read_text()
    for kind in (report.OPERATIONS, report.TRAINING, report.SAMPLING):
        assert [text.count(marker) for marker in report.markers(kind)] == [1, 1]


def test_results_keep_rows_of_the_same_machine_only(tmp_path):
    path = tmp_path / "results.json"
    header = {key: HEADER[key] for key in ("format", "device", "kind", "isa", "versions")}
    first = results.Results(path, header)
    first.add(row())
    first.add(row(shape="256@8"))
    first.save()
    second = results.Results(path, header)
    second.add(row(eager=5.0))
    second.save()
    rows = {r["shape"]: r["times_faster"]["eager"] for r in results.load(path)["rows"]}
    assert rows == {"128@32": 5.0, "256@8": 2.0}
    other = results.Results(path, {**header, "device": "another"})
    other.add(row())
    other.save()
    assert len(results.load(path)["rows"]) == 1
    assert results.load(path)["device"] == "another"
