"""The report of the GPU runs: medians, shares, and which goals are met."""

from gpu import lines, report


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
        **{"gbps": 1.0, **names, **more},
    }


def goals_of(*rows):
    found = {}
    for name, case, value, met in report.goals(list(rows)):
        found.setdefault(
            name.split(",")[0] + (" compiled" if "compiled" in name else ""), []
        ).append((case, value, met))
    return found


def test_goals_are_judged_against_their_own_peers():
    found = goals_of(
        sampled("eager", 1, report.OURS, 1.0),
        sampled("eager", 1, report.OURS, 3.0),
        sampled("eager", 1, report.OURS, 2.0),  # the median of the rounds
        sampled("eager", 1, "diffusers float32", 10.0),
        sampled("eager", 1, "diffusers bfloat16", 3.0),
        sampled("compiled", 64, report.OURS, 2.0),
        sampled("compiled", 64, "diffusers bfloat16 compiled", 2.0),
        sampled("compiled", 64, "plain bfloat16 max-autotune", 2.6),
        sampled("compiled", 256, report.OURS, 1.0),
        sampled("compiled", 256, "plain bfloat16 compiled", 9.0),
    )
    assert found["sampler"] == [("net, batch 1, over diffusers float32", "5x", "met")]
    assert [met for *_, met in found["sampler compiled"]] == ["missed", "met"]
    assert found["norms"] == [(None, None, "not measured")]


def test_operations_are_judged_by_their_fastest_backend_where_they_are_large():
    found = goals_of(
        operation("copy", 1.0),
        operation("triton", 2.0, percent_of_copy=80.0),
        operation("cuda", 1.0, percent_of_copy=91.0),
        operation("triton", 1.0, op="posterior_step", size=1 << 20, percent_of_copy=10.0),
        operation("triton", 2.0, op="attention", size=1 << 20, percent_of_copy=10.0),
        operation("sdpa", 2.8, op="attention", size=1 << 20, percent_of_copy=5.0),
    )
    assert found["q_sample"] == [("s float32 NCHW, cuda", "91 %", "met")]
    assert found["posterior_step"] == [(None, None, "not measured")]
    assert found["attention"] == [("s float32 NCHW, triton over sdpa", "1.4x", "missed")]


def test_the_report_says_what_was_not_measured(tmp_path):
    lines.write(tmp_path, "sampler", contender="cuda", network="net", batch=1, error="Bad: a | b")
    assert report.main(["--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "| sampler | cuda, net, 1 | Bad: a \\| b |" in text
    assert "| norms, 85 % of a copy | – | – | not measured |" in text
    assert "## Operations" not in text


def test_a_report_of_nothing_says_so(tmp_path, capsys):
    assert report.main(["--out", str(tmp_path)]) == 0
    assert "Nothing was measured" in capsys.readouterr().out


def test_a_share_of_the_matrix_products_rate_is_of_the_same_phase():
    rows = [
        {"phase": "compiled", "matmul_tflops": 4.0},
        {"phase": "eager", "matmul_tflops": 8.0},
        sampled("compiled", 64, report.OURS, 2.0, norms="triton", psnr_db=40.0),
    ]
    assert list(report.sampling(rows)) == [("net", 64, report.OURS, "triton", 2.0, 25.0, 40.0)]
