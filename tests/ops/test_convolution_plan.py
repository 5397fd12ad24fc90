"""The convolutions' plan: a pure function, and the committed measurements it rests on."""

import json
import math

import pytest
import torch

from fastdiff.ops.convolution.fastest import (
    Products,
    Units,
    Workload,
    fastest,
    folded_is_faster,
    possible,
)
from paths import ROOT

FOLDER = ROOT / "benchmarks" / "results" / "convolution_plan"
TABLES = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}

NONE, TILES, PAIRS = Units(False, False), Units(True, False), Units(False, True)


def workload(**changes):
    fields = dict(dtype=torch.float32, samples=1, channels=256, out_channels=256, height=16)
    rest = dict(width=16, kernel=(3, 3), stride=1, units=NONE)
    return Workload(**{**fields, **rest, **changes})


@pytest.mark.parametrize("units", [NONE, TILES], ids=["without AMX", "AMX"])
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_the_rule_agrees_with_the_measurements(table, units):
    """Within a tenth of the fastest on average, and nowhere half as fast."""
    lost = []
    for row in table["rows"]:
        choice, _ = fastest(
            workload(
                dtype=getattr(torch, row["dtype"]),
                height=row["side"],
                width=row["side"],
                kernel=(row["kernel"],) * 2,
                units=units,
                upsample=row.get("upsample", False),
                **{key: row[key] for key in ("samples", "channels", "out_channels")},
            )
        )
        times = dict(row["microseconds"])
        theirs = times.pop("pytorch")
        if not units.amx:  # as on a CPU without tiles
            times = {name: v for name, v in times.items() if name not in ("split", "bfloat16")}
        found = times[choice.name.lower()]
        lost.append(found / min(times.values()))
        if row["dtype"] == "float32" and row["kernel"] == 3:
            assert found < theirs, row
    assert len(lost) > 90
    assert max(lost) < 2 and math.prod(lost) ** (1 / len(lost)) < 1.1, sorted(lost)[-10:]


@pytest.mark.parametrize(
    ("changes", "products", "reason"),
    [
        ({}, Products.WINOGRAD4, "4×4"),
        ({"samples": 1, "height": 4, "width": 4}, Products.WINOGRAD2, "for 1 of 4×4"),
        ({"stride": 2}, Products.FLOAT32, "without a stride"),
        ({"kernel": (1, 1)}, Products.FLOAT32, "3×3"),
        ({"units": TILES}, Products.SPLIT, "AMX"),
        ({"units": TILES, "kernel": (1, 1)}, Products.SPLIT, "AMX"),
        ({"units": TILES, "dtype": torch.bfloat16}, Products.BFLOAT16, "AMX"),
        ({"units": Units(True, True), "dtype": torch.bfloat16}, Products.BFLOAT16, "AMX"),
        ({"units": PAIRS, "dtype": torch.bfloat16}, Products.PAIRS, "two channels"),
        ({"units": PAIRS}, Products.WINOGRAD4, "4×4"),
        ({"dtype": torch.bfloat16}, Products.WINOGRAD4, "4×4"),
        ({"dtype": torch.bfloat16, "kernel": (1, 1)}, Products.FLOAT32, "as float32"),
        ({"dtype": torch.float16}, Products.WINOGRAD4, "4×4"),
    ],
)
def test_what_the_plan_says(changes, products, reason):
    found, why = fastest(workload(**changes))
    assert found == products and reason in why
    if products not in (Products.BFLOAT16, Products.SPLIT, Products.PAIRS):
        work = workload(**changes)
        assert found in possible(work.dtype, work.kernel, work.stride)


def test_products_of_the_values_themselves():
    for units in (NONE, TILES, PAIRS):
        assert fastest(workload(units=units), exact=True)[0] == Products.FLOAT32
        half = workload(units=units, dtype=torch.bfloat16)
        assert fastest(half, exact=True) == fastest(half)


def test_a_doubling_is_folded_into_large_results():
    """Whatever their number."""
    doubled = {"upsample": True, "samples": 4}
    assert folded_is_faster(workload(**{**doubled, "samples": 1}))
    assert not folded_is_faster(workload(height=8, width=31, **doubled))
    assert not folded_is_faster(workload(stride=2, **doubled))
    assert not folded_is_faster(workload(samples=4))
