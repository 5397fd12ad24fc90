"""What save accepts, load reads: wrapped, tied and rewritten networks, averages, extra files."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import fastdiff
from fastdiff import EMA, UNet, load, save
from fastdiff.checkpoints.diffusers_unet import load_unet, save_unet
from fastdiff.errors import InputError
from fastdiff.models.wrappers import plain_name, unwrapped

TINY = (1, 8, 1, 1, ())


def network(seed: int = 0, **options) -> UNet:
    torch.manual_seed(seed)
    model = UNet(*TINY, channel_mult=(1,), **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.eval()


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    """DistributedDataParallel wants a process group: of this process alone."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPERS = {
    "compile": torch.compile,
    "DataParallel": nn.DataParallel,
    "DDP": nn.parallel.DistributedDataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
}


def compile_a_layer(model: UNet) -> None:
    model.middle_block = torch.compile(model.middle_block)


def tie(model: UNet) -> None:
    model.middle_block[2].in_layers[2].weight = model.middle_block[0].in_layers[2].weight


def slices_of_one_storage(model: UNet) -> None:
    whole = torch.randn(40)
    model.time_embed[0].bias.data, model.out[0].bias.data = whole[:32], whole[32:]


STATES = {
    "plain": lambda model: None,
    "a compiled layer": compile_a_layer,
    "tied weights": tie,
    "accelerated": fastdiff.accelerate,
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "float16": lambda model: model.half(),
    "slices": slices_of_one_storage,
    "frozen": lambda model: model.time_embed.requires_grad_(False),
    "contiguous": lambda model: model.to(memory_format=torch.contiguous_format),
}


@pytest.mark.seconds
@settings(max_examples=25, deadline=None)
@given(
    state=st.sampled_from(sorted(STATES)),
    wrappers=st.lists(st.sampled_from(sorted(WRAPPERS)), max_size=3, unique=True),
    average_of=st.sampled_from(["nothing", "network", "wrapper"]),
)
def test_what_is_saved_loads_with_equal_weights(tmp_path_factory, state, wrappers, average_of):
    model = network()
    STATES[state](model)
    wrapped = model
    for name in wrappers:
        wrapped = WRAPPERS[name](wrapped)
    ema = None
    if average_of != "nothing":
        ema = EMA(model if average_of == "network" else wrapped, (0.5,))
        with torch.no_grad():
            for parameter in wrapped.parameters():
                parameter.mul_(2)
        ema.update()
    path = save(tmp_path_factory.mktemp("saved") / "c", wrapped, ema=ema)

    inside = unwrapped(wrapped)
    expected = {plain_name(name): v.float() for name, v in inside.state_dict().items()}
    found = load(path, weights="model").model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    if ema is not None:
        found = load(path, weights="0.5").model.state_dict()
        averaged = ema.state_dict(0.5)
        assert found.keys() == averaged.keys()
        assert all(torch.equal(found[name], averaged[name]) for name in averaged)


def test_the_averages_of_a_wrapper_are_those_of_its_network():
    model = network()
    ema = EMA(torch.compile(model), (0.5,))
    assert ema.names == EMA(model, (0.5,)).names
    other = nn.DataParallel(network(1))
    ema.copy_to(other, 0.5)
    assert all(map(torch.equal, other.parameters(), model.parameters()))


def refused(tmp_path: Path, model, *words: str, **options) -> None:
    """One line, and nothing written: an older checkpoint stays as it was."""
    path = save(tmp_path / "c", network(9), step=1)
    for target in (path, tmp_path / "new"):
        with pytest.raises(InputError) as caught:
            save(target, model, **options)
        message = str(caught.value)
        assert "\n" not in message and all(word in message for word in words), message
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]
    assert load(path).step == 1
    assert all(map(torch.equal, load(path).model.parameters(), network(9).parameters()))


class Adapted(nn.Module):
    """As peft does it: the layer becomes a module that holds it and two more."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A, self.lora_B = nn.Linear(8, 2), nn.Linear(2, 32)


def replaced(place: int, layer: nn.Module):
    return lambda model: model.out.__setitem__(place, layer)


INT8 = nn.Parameter(torch.zeros(1, dtype=torch.int8), requires_grad=False)
SPARSE = nn.Parameter(torch.ones(32, 8).to_sparse())
REWRITTEN = [
    ("remove_parametrizations", lambda m: nn.utils.parametrizations.weight_norm(m.time_embed[0])),
    ("remove_parametrizations", lambda m: nn.utils.parametrizations.spectral_norm(m.out[2])),
    ("remove_weight_norm", lambda m: nn.utils.weight_norm(m.time_embed[0])),
    ("remove_spectral_norm", lambda m: nn.utils.spectral_norm(m.time_embed[0])),
    ("prune.remove", lambda m: prune.l1_unstructured(m.time_embed[0], "weight", 0.5)),
    ("merge_and_unload", lambda m: m.time_embed.__setitem__(0, Adapted(m.time_embed[0]))),
    ("out.2.weight is (3, 8, 3, 3)", replaced(2, nn.Conv2d(8, 3, 3))),
    ("1 missing, such as out.2.bias", replaced(2, nn.Conv2d(8, 1, 3, bias=False))),
    ("2 unexpected, such as other.", lambda m: m.add_module("other", nn.Linear(1, 1))),
    ("time_embed.0.weight is (32, 8)", lambda m: m.config.update(model_channels=16)),
    ("describes no fastdiff UNet", lambda m: m.config.update(depth=3)),
    ("meta device", lambda m: m.to("meta")),
    ("no shape yet", replaced(2, nn.LazyConv2d(1, 3))),
    ("bias is torch.int8", lambda m: m.out[2].register_parameter("bias", INT8)),
    ("torch.sparse", lambda m: m.time_embed[0].register_parameter("weight", SPARSE)),
]


@pytest.mark.sample(5)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("words", "rewrite"), REWRITTEN)
def test_a_network_that_its_config_does_not_describe_is_refused(tmp_path, words, rewrite):
    model = network()
    rewrite(model)
    refused(tmp_path, model, "cannot save", words)
    refused(tmp_path, torch.compile(model), "cannot save", words)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_quantized_network_is_refused(tmp_path):
    model = torch.ao.quantization.quantize_dynamic(network(), {nn.Linear}, dtype=torch.qint8)
    refused(tmp_path, model, "quantized layers")


class Logged(UNet):
    pass


class Wider(UNet):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.head = nn.Conv2d(1, 1, 1)


@pytest.mark.seconds
def test_a_subclass_is_loaded_as_itself(tmp_path):
    for kind in (Logged, Wider):
        model = kind(*TINY, channel_mult=(1,))
        loaded = load(save(tmp_path / kind.__name__, model)).model
        assert type(loaded) is kind
        assert all(map(torch.equal, loaded.parameters(), model.parameters()))


@pytest.mark.seconds
def test_a_subclass_that_cannot_be_imported_is_a_unet_if_its_weights_are(tmp_path):
    class Local(UNet):
        pass

    class LocalWider(Wider):
        pass

    model = Local(*TINY, channel_mult=(1,))
    loaded = load(save(tmp_path / "c", model)).model
    assert type(loaded) is UNet
    assert all(map(torch.equal, loaded.parameters(), model.parameters()))
    path = save(tmp_path / "wider", LocalWider(*TINY, channel_mult=(1,)))
    with pytest.raises(InputError, match="holds the weights of a LocalWider"):
        load(path)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"num_classes": 3}, "1 unexpected, such as label_emb.weight"),
        ({"out_channels": 2}, "out.2.weight is (2, 8, 3, 3), this network has (1, 8, 3, 3)"),
    ],
)
def test_averages_of_another_network_are_refused(tmp_path, other, words):
    ema = EMA(UNet(**{**network().config, **other}), (0.5, 0.9))
    refused(tmp_path, network(), "the average of rate 0.5", "another network", words, ema=ema)


@pytest.mark.parametrize("name", ["model", "ema_0.5", "../stolen", "a/b", ""])
def test_extra_tensors_take_no_name_of_the_checkpoint(tmp_path, name):
    model, extra = network(), {name: {"x": torch.zeros(1)}}
    options = {"ema": EMA(model, (0.5,)), "extra_tensors": extra}
    refused(tmp_path, model, "extra_tensors", repr(name), **options)


def test_extra_json_takes_no_name_of_the_checkpoint(tmp_path):
    refused(tmp_path, network(), "extra_json", "'config'", extra_json={"config": {}})


class NoProcess:
    def to_config(self):
        return {"process": "mine"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"step": 3.0}, "its step cannot be 3.0"),
        ({"step": "7"}, "its step cannot be '7'"),
        ({"diffusion": NoProcess()}, "its to_config() gives none"),
    ],
)
def test_values_that_load_would_refuse_are_not_written(tmp_path, options, words):
    refused(tmp_path, network(), words, **options)


def test_diffusers_format_looks_through_wrappers_too(tmp_path):
    model = network(norm_num_groups=8)
    path = save_unet(tmp_path / "network", nn.DataParallel(torch.compile(model)))
    expected = load_unet(save_unet(tmp_path / "plain", model)).state_dict()
    assert all(map(torch.equal, load_unet(path).state_dict().values(), expected.values()))
    model.out[2] = nn.Conv2d(8, 3, 3)
    with pytest.raises(InputError, match=r"out.2.weight is \(3, 8, 3, 3\)"):
        save_unet(tmp_path / "edited", model)
    assert not (tmp_path / "edited").exists()
