"""The report of the GPU runs: medians, shares, and which goals are met."""

from gpu import goals, lines, report
from harness import summary


def sampled(phase, batch, contender, ms, **more):
    return {
        "phase": phase,
        "network": "net",
        "batch": batch,
        "contender": contender,
        "ms_per_step": ms,
        "tflops": 1.0,
        **more,
    }


def operation(contender, seconds, op="q_sample", size=1 << 28, **more):
    names = {"shape": "s", "dtype": "float32", "layout": "NCHW", "bytes": size}
    return {
        **{"phase": "operations", "op": op, "contender": contender, "seconds": seconds},
        **{"direction": "forward", "gbps": 1.0, **names, **more},
    }


def benchmark(op="q_sample", percent=91.0, size=1 << 28, **more):
    """A row of pytest-benchmark's: ours takes 1 ms, and the floor so many percent of it."""
    return {
        **{"phase": f"bench_{op}", "op": op, "variant": "silu", "shape": "128@32", "batch": 32},
        **{"dtype": "bfloat16", "layout": "NCHW", "direction": "forward", "bytes": size},
        **{"ours": "triton", "times_s": {"triton": 1e-3, "eager": 4e-3}, "gbps": 300.0},
        **{"times_faster": {"eager": 4.0}, "targets": {}, "floor_s": percent * 1e-5},
        **{"percent_of_floor": percent, "missing": {}, **more},
    }


def goals_of(*rows):
    """By the goal's name, without those that nothing was measured for."""
    found = {}
    for name, *verdict in goals.goals(list(rows)):
        found.setdefault(name, []).append(tuple(verdict))
    nothing = [(None, None, "not measured")]
    assert set(found) >= set(goals.expected())
    return {name: verdicts for name, verdicts in found.items() if verdicts != nothing}


def test_goals_are_judged_against_their_own_peers():
    found = goals_of(
        sampled("eager", 1, goals.OURS, 1.0),
        sampled("eager", 1, goals.OURS, 3.0),
        sampled("eager", 1, goals.OURS, 2.0),  # the median of the rounds
        sampled("eager", 1, "diffusers float32", 10.0),
        sampled("eager", 1, "diffusers bfloat16", 3.0),
        sampled("compiled", 64, goals.OURS, 2.0),
        sampled("compiled", 64, "diffusers bfloat16 compiled", 2.0),
        sampled("compiled", 64, "plain bfloat16 max-autotune", 2.6),
        sampled("compiled", 256, goals.OURS, 1.0),
        sampled("compiled", 256, "plain bfloat16 compiled", 9.0),
    )
    eager, compiled = (goals.SAMPLER_GOALS[phase].name for phase in ("eager", "compiled"))
    assert found == {
        eager: [("net, batch 1, over diffusers float32", "5x", "met")],
        compiled: [
            ("net, batch 64, over diffusers bfloat16 compiled", "1x", "missed"),
            ("net, batch 64, over plain bfloat16 max-autotune", "1.3x", "met"),
        ],
    }


def test_operations_are_judged_by_their_fastest_backend_where_they_are_large():
    attention = {"op": "attention", "size": 1 << 20, "targets": {"sdpa": 1.5}}
    backward = {"op": "group_norm_silu", "direction": "backward"}
    found = goals_of(
        operation("copy", 1.0),
        operation("triton", 2.0, percent_of_copy=80.0),
        operation("cuda", 1.0, percent_of_copy=91.0),
        operation("triton", 1.0, op="posterior_step", size=1 << 20, percent_of_copy=10.0),
        operation("triton", 2.0, **attention, percent_of_copy=10.0),
        operation("sdpa", 2.8, **attention, percent_of_copy=5.0),
        operation("triton", 2.0, **backward, percent_of_copy=79.0),
    )
    assert found == {
        "q_sample forward, 90 % of a copy": [("s float32 NCHW, cuda", "91 %", "met")],
        "attention forward, 1.5x PyTorch's": [
            ("s float32 NCHW, triton over sdpa", "1.4x", "missed")
        ],
        "group_norm_silu backward, 80 % of a copy": [("s float32 NCHW, triton", "79 %", "missed")],
    }


def test_benchmarks_are_judged_as_the_phase_operations_is():
    sdpa = {"op": "attention", "targets": {summary.BEST_SDPA: 1.0}, "best_sdpa": "sdpa flash"}
    times = {"triton": 1e-3, "sdpa flash": 1.1e-3, "sdpa math": 9e-3}
    cuda_wins = {"triton": 1e-3, "cuda": 0.5e-3}
    found = goals_of(
        benchmark(percent=40.0),
        benchmark(percent=91.0),  # measured again
        benchmark(percent=10.0, size=1 << 20, shape="small"),
        benchmark("posterior_step", percent=46.0, times_s=cuda_wins),
        benchmark(**sdpa, times_s=times, times_faster={summary.BEST_SDPA: 1.1}),
        benchmark("group_norm_silu", percent=50.0),
        # Of 5 passes the backward's are 3: 0.6 ms of the floor in 0.75 of the 1.75 ms.
        benchmark(
            "group_norm_silu",
            **{"direction": "forward+backward", "times_s": {"triton": 1.75e-3}},
            **{"floor_s": 1e-3, "size": 3 << 28},
        ),
    )
    case = "silu 128@32 batch 32 bfloat16 NCHW"
    assert found == {
        "q_sample forward, 90 % of a copy": [(f"{case}, triton", "91 %", "met")],
        "posterior_step forward, 90 % of a copy": [(f"{case}, cuda", "92 %", "met")],
        "attention forward, 1x PyTorch's": [(f"{case}, triton over best sdpa", "1.1x", "met")],
        "group_norm_silu forward, 85 % of a copy": [(f"{case}, triton", "50 %", "missed")],
        "group_norm_silu backward, 80 % of a copy": [(f"{case}, by difference", "80 %", "met")],
    }


def test_benchmarks_have_a_table():
    (row,) = report.benchmarks([benchmark(percent=91.0)])
    case = "silu 128@32 batch 32 bfloat16 NCHW"
    assert row == ("q_sample", "forward", case, "triton", 1.0, 300.0, 91.0, "eager 4.00x")


def test_the_report_says_what_was_not_measured(tmp_path):
    lines.write(tmp_path, "sampler", contender="cuda", network="net", batch=1, error="Bad: a | b")
    assert report.main(["--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "| sampler | cuda, net, 1 | Bad: a \\| b |" in text
    assert "| group_norm_silu forward, 85 % of a copy | – | – | not measured |" in text
    assert "## Operations" not in text


def test_what_is_missing_is_what_the_last_run_says():
    case = {"contender": "plain", "network": "net", "batch": 64}
    later = {"contender": "diffusers", "network": "net", "batch": 64}
    smoke = {"phase": "smoke", "op": "q_sample", "allowed": 0.1, "error": 0.5}
    rows = [
        {"phase": "sampler", "contender": "cuda", "error": "mended since"},
        {"phase": "sampler", "outcome": "failed (exit 1)"},
        {"phase": "sampler", "contender": "cuda", "ms_per_step": 1.0},
        {"phase": "sampler", "outcome": "ok"},
        {"phase": "compiled", "planned": [case, later]},
        {"phase": "compiled", **case, "ms_per_step": 1.0},
        {"phase": "compiled", "outcome": "cut after 130 s"},
        {**smoke, "backend": "triton", "ok": True},
        {**smoke, "backend": "cuda", "ok": False},
        benchmark(missing={"sdpa flash": "no kernel"}),
        {"phase": "ncu", "error": "no permission"},
        {"phase": "ncu", "outcome": "failed (exit 1)"},
    ]
    assert list(report.missing(rows)) == [
        ("compiled", "diffusers, net, 64", "not done when the phase ended"),
        ("compiled", "the phase", "cut after 130 s"),
        ("smoke", "q_sample, cuda", "off by 0.5, 0.1 is allowed"),
        ("bench_q_sample", "q_sample by sdpa flash", "no kernel"),
        ("ncu", None, "no permission"),
        ("ncu", "the phase", "failed (exit 1)"),
    ]


def test_a_report_of_nothing_says_so(tmp_path, capsys):
    assert report.main(["--out", str(tmp_path)]) == 0
    assert "Nothing was measured" in capsys.readouterr().out


def test_a_share_of_the_matrix_products_rate_is_of_the_same_phase():
    rows = [
        {"phase": "compiled", "matmul_tflops": 4.0},
        {"phase": "eager", "matmul_tflops": 8.0},
        sampled("compiled", 64, goals.OURS, 2.0, norms="triton", psnr_db=40.0),
    ]
    assert list(report.sampling(rows)) == [("net", 64, goals.OURS, "triton", 2.0, 25.0, 40.0)]


def test_steps_of_training():
    rows = [
        {
            **{"phase": "training", "network": "net", "batch": 8, "contender": who},
            **{"round": number, "step_ms": ms + number, "images_per_s": 8e3 / ms},
        }
        for who, ms in (("eager", 8.0), ("graph", 4.0))
        for number in range(3)
    ]
    found = list(report.training(rows))
    assert found == [("net", 8, "eager", 9.0, 1000.0), ("net", 8, "graph", 5.0, 2000.0)]
