"""The rows of sampling: other runtimes' graphs, the floor of a network's products, the table."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import measure_sampling
import report
from fastdiff.optional import version_of
from harness import peers, peers_graphs, peers_sampling, products, results

CPU = torch.device("cpu")


def runtime(name):
    for package in peers_graphs.RUNTIMES[name].packages:
        pytest.importorskip(package)
    return peers_graphs.RUNTIMES[name]


@pytest.mark.seconds
@pytest.mark.parametrize("name", peers_graphs.RUNTIMES)
def test_a_graph_computes_the_network(name, tmp_path):
    served, path = runtime(name), tmp_path / peers_graphs.RUNTIMES[name].file
    peers_graphs.write(name, "tiny", 2, path)
    x, t = peers.images("tiny", 2), torch.tensor([3, 900])
    with torch.no_grad():
        expected = peers.diffusers_network("tiny").eval()(x, t).sample
    network = served.load(path, torch.float32)
    torch.testing.assert_close(network(x, t), expected, rtol=1e-4, atol=1e-5)
    assert (network(x, t.flip(0)) - expected).abs().max() > 1e-3
    for dtype in served.dtypes[1:]:
        try:
            rounded = served.load(path, dtype)(x, t)
        except RuntimeError as error:  # of a CPU without such products
            assert "OpenVINO computes in" in str(error)
        else:
            assert 1e-4 < (rounded - expected).abs().max() < 0.1


@pytest.mark.long
@pytest.mark.parametrize("name", peers_graphs.RUNTIMES)
def test_a_graph_of_a_process_of_its_own_samples(name):
    runtime(name)
    _, reference = peers_sampling.reference_images("tiny", CPU, 3)
    made = peers_sampling.contenders("tiny", 2, CPU, 3, {})
    assert peers_sampling.psnr_db(made[f"{name} float32"]()(), reference) > 90


def test_a_runtime_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(peers_graphs, "find_spec", lambda package: None if "onnx" in package else 1)
    with pytest.raises(ImportError, match="^onnxruntime is not installed here$"):
        peers_graphs.network("onnxruntime", "tiny", 1, torch.float32)
    peers_graphs.require("openvino")


@pytest.mark.seconds
def test_autocast_rounds_the_products_and_not_the_weights(monkeypatch):
    pytest.importorskip("diffusers")
    model, seen = peers.diffusers_network("tiny"), []
    model.conv_out.register_forward_hook(lambda layer, _, y: seen.append((layer.weight, y)))
    monkeypatch.setattr(peers, "diffusers_network", lambda name: model)
    peers_sampling.contenders("tiny", 2, CPU, 2)["diffusers bfloat16 autocast"]()()
    assert len(seen) == 2
    for weight, y in seen:
        assert (weight.dtype, y.dtype) == (torch.float32, torch.bfloat16)
        assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.seconds
def test_peak_memory_is_of_a_process_that_samples():
    least = sum(p.nbytes for p in peers.fastdiff_network("tiny").parameters()) / 2**20
    assert least < peers_sampling.peak_memory_mb("tiny", 1, "plain float32") < 4096


@pytest.mark.parametrize("name", ["tiny", "small", "ddpm-cifar10"])
def test_the_floor_has_every_product_of_the_network(name):
    found = products.layers(name, 2)
    flops = sum(count * layer.flops for layer, count in found.items())
    assert flops == peers_sampling.network_flops(name, 2)


LAYERS = {
    "strided": products.Convolution((2, 4, 6, 6), (8, 4, 3, 3), (2, 2), (1, 1)),
    "3x3": products.Convolution((1, 8, 5, 7), (4, 8, 3, 3), (1, 1), (1, 1)),
    "one product": products.Product(1, 5, 8, 3),
    "many products": products.Product(4, 5, 8, 3),
}


@pytest.mark.parametrize("dtype", peers_sampling.DTYPES.values(), ids=str)
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_all_ways_of_a_layer_are_the_same_function(layer, dtype):
    with torch.no_grad():
        results = [way() for way in layer.ways(dtype)]
    assert len(results) >= 2
    assert all(result.dtype == dtype for result in results)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-2, atol=3e-2)


def test_a_kernel_of_one_position_is_a_matrix_product():
    x, weight = torch.randn(2, 6, 4, 5), torch.randn(3, 6, 1, 1)
    layer = products._convolution(x.shape, weight.shape, (1, 1), (0, 0))
    assert layer == products.Product(1, F.conv2d(x, weight)[:, 0].numel(), 6, 3)


@pytest.mark.seconds
def test_the_floor_is_the_best_of_all_turns(monkeypatch):
    floor = products.Floor("tiny", 1, torch.float32)
    assert floor.floor_s == math.inf
    floor.turn()
    first = floor.floor_s
    assert first == sum(count * floor.best[layer] for layer, count in floor.layers.items()) > 0
    monkeypatch.setattr(products, "seconds", lambda way: 1e-9)
    floor.turn()
    assert floor.floor_s == pytest.approx(1e-9 * floor.layers.total())
    assert floor.floor_s < first


def contenders(name, batch, device, steps):
    """Whose images are ours, or off by 0.2."""

    def missing():
        raise ImportError("onnxruntime is not installed here")

    def sampling(error):
        return lambda: lambda: torch.full((batch, 3, 8, 8), error)

    return {
        "diffusers float32": sampling(0.2),
        "diffusers bfloat16": missing,
        "onnxruntime float32": missing,
        "plain float32": missing,
        "fastdiff float32": sampling(0.0),
    }


@pytest.fixture
def measured(monkeypatch, tmp_path, capsys):
    """(the file, what was printed) of a run: our calls take 10 ms, diffusers' 20, 30, 40, …"""
    ticks = itertools.count(2)
    monkeypatch.setattr(peers_sampling, "contenders", contenders)
    reference = "diffusers", torch.zeros(2, 3, 8, 8)
    monkeypatch.setattr(peers_sampling, "reference_images", lambda *_: reference)
    monkeypatch.setattr(peers_sampling, "peak_memory_mb", lambda *_: 321.4)
    monkeypatch.setattr(
        measure_sampling, "seconds", lambda call: 0.02 * (next(ticks) if call().any() else 1)
    )
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    path = tmp_path / "sampling.json"
    options = "--presets tiny --batches 2 --dtypes float32 --steps 2 --rounds 3 --out"
    measure_sampling.main([*options.split(), str(path)])
    return path, capsys.readouterr().out


def test_a_row_is_a_race_of_one_dtype(measured):
    path, said = measured
    (row,) = results.load(path)["rows"]
    assert row["times_s"] == pytest.approx({"fastdiff float32": 0.01, "diffusers float32": 0.03})
    assert row["least_s"] == pytest.approx({"fastdiff float32": 0.01, "diffusers float32": 0.02})
    assert row["times_faster"] == pytest.approx({"diffusers float32": 3.0})
    assert row["psnr_db"] == pytest.approx({"fastdiff float32": 200, "diffusers float32": 20})
    assert row["packages"]["diffusers"] == version_of("diffusers")
    assert row["missing"] == {"onnxruntime float32": "onnxruntime is not installed here"}
    assert "left out: onnxruntime float32: onnxruntime is not installed here" in said
    assert "| tiny | 2 | float32 | 2 | fastdiff float32 | 10 | 10 | – | 200 | 321 |" in said


def test_rows_become_the_table_of_the_page(measured, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# T\n<!-- sampling: start -->\nold\n<!-- sampling: end -->\nend\n")
    assert report.main([str(measured[0]), "--page", str(page), "--docs", str(tmp_path)]) == 0
    ours, theirs, floor = page.read_text().split("| --- |\n")[1].splitlines()[:3]
    assert ours == "| tiny | 2 | float32 | 2 | fastdiff float32 | 10 | 10 | – | 200 | 321 |"
    assert theirs == "| tiny | 2 | float32 | 2 | diffusers float32 | 30 | 20 | 3.00× | 20 | 321 |"
    assert "its products alone" in floor and "old" not in page.read_text()


def test_what_we_measure_ourselves_is_never_left_out(monkeypatch):
    def fails():
        raise RuntimeError("ours")

    monkeypatch.setattr(peers_sampling, "contenders", lambda *_: {"fastdiff float32": fails})
    monkeypatch.setattr(peers_sampling, "reference_images", lambda *_: ("", torch.zeros(1)))
    with pytest.raises(RuntimeError, match="ours"):
        measure_sampling.measure("tiny", 1, "float32", 2, 1, ())


def test_patterns_choose_rivals_of_the_dtype():
    made = peers_sampling.contenders("tiny", 1, CPU, 2)
    chosen = [n for n in made if measure_sampling.is_wanted(n, "float32", measure_sampling.RIVALS)]
    assert {"diffusers float32", "openvino float32", "onnxruntime float32"} <= set(chosen)
    assert not any(n.startswith(("plain", "fastdiff")) or "bfloat16" in n for n in chosen)
    compiled = [n for n in made if measure_sampling.is_wanted(n, "bfloat16", ["* compiled"])]
    assert {"diffusers bfloat16 compiled", "fastdiff bfloat16 compiled"} <= set(compiled)


def test_a_contender_is_made_once_and_not_before_its_turn():
    made = []

    def make():
        made.append(True)
        return lambda: "images"

    sample = peers_sampling.on_first_call(make)
    assert not made
    assert [sample(), sample()] == ["images", "images"] and made == [True]
