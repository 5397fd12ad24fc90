"""The comparison of ways of sampling, on a small network."""

import json

import pytest

import measure_combination
from parts_tools import save_network


@pytest.mark.seconds
def test_a_row_for_each_way(tmp_path, capsys):
    checkpoint, out = save_network(tmp_path / "network", 0), tmp_path / "rows.json"
    ways = list(measure_combination.WAYS)[:2] + ["UniPC, trailing, 6 steps"]
    measure_combination.main(
        ["--checkpoint", str(checkpoint), "--data", "digits", "--num", "6", "--rounds", "1"]
        + ["--batch-size", "4", "--out", str(out), "--ways", *ways]
    )
    rows = json.loads(out.read_text())["rows"]
    assert [row["way"] for row in rows] == ways
    assert [row["calls"] for row in rows] == [50, 50, 6]
    assert rows[0]["ratio"] == 1 and all(row["images_s"] > 0 for row in rows)
    assert rows[0]["frechet"] == pytest.approx(rows[1]["frechet"], rel=0.05)
    assert capsys.readouterr().out.count("\n| ") == 3
