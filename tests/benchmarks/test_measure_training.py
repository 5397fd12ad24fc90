"""The rows of training: what a process measures, what the forms amount to, and their tables."""

import json

import pytest

import measure_training
import report
from fastdiff.ranks import ALONE
from harness import results, training

RATES = {"whole": 150.0, "one": 100.0, "apart": 160.0, "ddp": 120.0, "fsdp2": 40.0}


def test_every_preset_has_a_batch():
    assert len(measure_training.NAMES) > 10
    for name in measure_training.NAMES:
        for cuda in (False, True):
            assert measure_training.batch_of(name, cuda) >= 1


@pytest.mark.seconds
def test_a_process_measures_the_trainers_steps(monkeypatch):
    monkeypatch.setattr(training, "TURN_S", 1e-3)
    found = training.measure("digits", 2, "bfloat16", 1, False, True, ALONE)
    assert found["step_s"] > 0 and found["matmul_tflops"] > 0
    assert found["gradients"] == found["parameters"] and found["optimizer"] > found["parameters"]


def test_operations_are_counted_with_those_of_attention():
    # 4 of 16 tokens and 64 channels: 2 products forward, 4 back.
    attention = 4 * (2 + 4) * 2 * 16**2 * 64
    assert training.training_flops("digits") == 96_698_368 + attention


@pytest.mark.parametrize(
    ("variant", "starts", "batch"), [("whole", 1, 8), ("one", 1, 4), ("apart", 2, 4), ("ddp", 1, 8)]
)
def test_a_forms_rate_is_that_of_all_its_runs(monkeypatch, variant, starts, batch):
    (form,) = [form for form in measure_training.forms(2, False) if form.variant == variant]
    begun = []
    monkeypatch.setattr(measure_training, "start", lambda *args: begun.append(args))
    step = [[{"dtype": "float32", "step_s": 0.5}], [{"dtype": "bfloat16", "step_s": 0.25}]]
    monkeypatch.setattr(measure_training, "answer", lambda _: step)
    float32, bfloat16 = measure_training.run("digits", 8, form, [])
    assert [args[1] for args in begun] == [batch] * starts
    assert float32["images_per_s"] == starts * batch / 0.5
    assert bfloat16["images_per_s"] == starts * batch / 0.25 and bfloat16["batch"] == 8


def rows(tmp_path):
    """Two presets' rows as a run keeps them; of one the forms too."""
    header = {"format": results.FORMAT, "device": "Test CPU, 2 threads", "kind": "cpu"}
    header |= {"isa": "avx2", "versions": {"torch": "2.13.0"}, "ranks": 2}
    found = results.Results(tmp_path / "rows.json", header)
    once = {"dtype": "float32", "others_percent": 7.0, "batch": 8}
    peak = {"flops_per_image": 4e9, "matmul_tflops": 0.8}
    for shape in ("digits", "adm-64"):
        of_preset = {**once, **peak, "shape": shape, "images_per_s": 100.0}
        measure_training.keep(found, [of_preset], measure_training.Form("preset"))
    for form in measure_training.forms(2, False):
        rounds = [RATES[form.variant] + way for way in (-1.0, 0.0, 9.0)]
        every = [{**once, "shape": "digits", "images_per_s": rate} for rate in rounds]
        measure_training.keep(found, every, form)
    found.save()
    return found.path


def test_rows_become_the_tables_of_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# T\n<!-- training: start -->\nold\n<!-- training: end -->\nend\n")
    assert report.main([str(rows(tmp_path)), "--page", str(page), "--docs", str(tmp_path)]) == 0
    text = page.read_text()
    assert "| digits | 8 | float32 | 100 | 4 | 0.4 | 50 | 7 |" in text
    forms = "| digits | 8 | float32 | 150 | 100 | 160 | 120 | 40 | 0.60 | 0.75 | 0.25 | 0.80 | 7 |"
    assert forms in text
    assert text.count("adm-64") == 1 and "old" not in text and text.endswith("end\n")
    assert not list(tmp_path.glob("*.png"))


def test_a_row_is_the_median_of_its_rounds(tmp_path):
    stored = json.loads(rows(tmp_path).read_text())["rows"]
    (ddp,) = [row for row in stored if row["variant"] == "ddp"]
    assert ddp["images_per_s"] == RATES["ddp"] and ddp["rounds"] == 3


def test_what_others_take_of_the_cpus_leaves_ours_out():
    before = measure_training.others_seconds()
    assert before > 0
    assert measure_training.others_seconds() >= before - 0.05
