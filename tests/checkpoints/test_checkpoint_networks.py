"""Networks that are not fastdiff's UNet: saved as what they are, loaded by class or by factory."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastdiff
from fastdiff import EMA, UNet, load, save
from fastdiff.errors import InputError
from network_tools import Plain, SmallDiT, diffusers_unet


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


def described(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())["model"]


class Renamed(nn.Module):
    """Whose parts have names that wrappers have too."""

    def __init__(self):
        super().__init__()
        self.config = {}
        self.module, self.last = nn.Linear(2, 3), nn.Linear(3, 2)


@pytest.mark.parametrize(
    "make", [SmallDiT, diffusers_unet, Renamed], ids=lambda make: make.__name__
)
def test_its_class_and_config_make_it_again(tmp_path, make):
    model = make()
    path = save(tmp_path / "c", model)
    kind = type(model)
    named = {"class": f"{kind.__module__}:{kind.__qualname__}", "config": described(path)["config"]}
    assert described(path) == named
    torch.manual_seed(1)
    loaded = load(path).model
    assert type(loaded) is kind and same_weights(loaded, model) and not loaded.training


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, fastdiff.accelerate])
def test_a_wrapped_one_is_saved_as_itself(tmp_path, wrap):
    model = diffusers_unet()
    wrapped = wrap(model)
    path = save(tmp_path / "c", wrapped if isinstance(wrapped, nn.Module) else model)
    assert described(path)["class"] == "diffusers.models.unets.unet_2d:UNet2DModel"
    assert load(path, weights="model").model.state_dict().keys() == model.state_dict().keys()


def test_its_averages_have_what_is_not_averaged(tmp_path):
    model = SmallDiT()
    ema = EMA(model, (0.5,))
    with torch.no_grad():
        model.seen.fill_(7.0)
        model.out.bias.add_(1)
    ema.update()
    path = save(tmp_path / "c", model, ema=ema)
    found = load(path, weights=0.5).model
    assert float(found.seen) == 7 and torch.equal(found.places, model.places)
    assert torch.equal(found.out.bias, ema.state_dict(0.5)["out.bias"])
    assert not torch.equal(found.out.bias, model.out.bias)


class ByFactory(nn.Module):
    """Made by from_config alone, which changes its config's form."""

    def __init__(self, layers):
        super().__init__()
        self.config, self.layers = {"widths": [layer.out_features for layer in layers]}, layers

    @classmethod
    def from_config(cls, config):
        return cls(nn.ModuleList(nn.Linear(2, width) for width in config["widths"]))


def test_from_config_is_asked_first(tmp_path):
    model = ByFactory.from_config({"widths": [3, 1]})
    assert same_weights(load(save(tmp_path / "c", model)).model, model)


class LooksAtValues(nn.Module):
    """Whose constructor does not work on the meta device."""

    def __init__(self, width: int = 2):
        super().__init__()
        self.config = {"width": width if torch.arange(width).sum().item() >= 0 else 0}
        self.layer = nn.Linear(width, width)


def test_a_constructor_that_looks_at_values_leaves_the_random_numbers_alone(tmp_path):
    model = LooksAtValues()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    path = save(tmp_path / "c", model)
    assert torch.equal(torch.rand(3), expected)
    assert same_weights(load(path).model, model)


class Unsaid(nn.Linear):
    """Its config does not say its size."""

    def __init__(self, size=3, **config):
        super().__init__(2, size)
        self.config = config


def local() -> nn.Module:
    class Local(SmallDiT):
        pass

    return Local()


WEIGHTS_ALONE = [
    (Plain, Plain, "has no config"),
    (local, SmallDiT, "cannot be imported"),
    (lambda: Unsaid(4), lambda: Unsaid(4), "its config describes other weights: weight is (4, 2)"),
    (lambda: Unsaid(at=torch.device("cpu")), Unsaid, "its config has no JSON form"),
    (lambda: nn.Sequential(nn.Linear(2, 2)), lambda: nn.Sequential(nn.Linear(2, 2)), "no config"),
]


@pytest.mark.parametrize(("make", "make_again", "why"), WEIGHTS_ALONE)
def test_what_cannot_be_made_again_is_saved_as_weights(tmp_path, make, make_again, why):
    model = make()
    path = save(tmp_path / "c", model)
    with pytest.raises(InputError) as caught:
        load(path)
    words = (f"holds the weights of a {type(model).__name__}", why, "model=...")
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words)
    found = load(path, model=make_again)
    assert same_weights(found.model, model)
    given = make_again().train()
    assert load(path, model=given).model is given
    assert same_weights(given, model) and not given.training


def test_a_given_network_takes_any_checkpoint_and_imports_nothing(tmp_path):
    unet = UNet(1, 8, 1, 1, (), channel_mult=(1,))
    path = save(tmp_path / "unet", unet)
    again = torch.compile(UNet(1, 8, 1, 1, (), channel_mult=(1,)))
    assert same_weights(load(path, model=again).model._orig_mod, unet)
    rewrite(save(tmp_path / "c", SmallDiT()), {"class": "no.such.module:Name", "config": {}})
    assert isinstance(load(tmp_path / "c", model=SmallDiT).model, SmallDiT)


def rewrite(path: Path, model: dict) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "model": model}))


called = []


def not_a_class(**config):
    called.append(config)


class NotAModule:
    def __init__(self, **config):
        called.append(config)


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("no_such_package.networks:Net", "No module named 'no_such_package'"),
        ("network_tools:Gone", "has no attribute 'Gone'"),
        ("network_tools", "cannot be imported"),
        ("network_tools:SmallDiT()", "cannot be imported"),
        ("__main__:Net", "cannot be imported"),
        (f"{__name__}:not_a_class", "is no subclass of nn.Module, and was not called"),
        (f"{__name__}:NotAModule", "is no subclass of nn.Module, and was not called"),
        ("os:system", "is no subclass of nn.Module, and was not called"),
        (7, "cannot be imported"),
    ],
)
def test_only_a_module_is_made(tmp_path, named, words):
    path = save(tmp_path / "c", SmallDiT())
    rewrite(path, {"class": named, "config": {"command": "true"}})
    with pytest.raises(InputError) as caught:
        load(path)
    message = str(caught.value)
    assert words in message and "\n" not in message
    assert str(path / "config.json") in message and "model=" in message
    assert called == []


def test_a_module_that_breaks_when_it_is_imported(tmp_path, monkeypatch):
    (tmp_path / "breaks_at_once.py").write_text("raise OSError('no licence\\nfor you')")
    monkeypatch.syspath_prepend(tmp_path)
    path = save(tmp_path / "c", SmallDiT())
    rewrite(path, {"class": "breaks_at_once:Net", "config": {}})
    with pytest.raises(InputError, match="cannot be imported: no licence"):
        load(path)
    assert "breaks_at_once" not in sys.modules


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"width": 12}, "holds the weights of another network: patch.weight is (16, 1, 2, 2)"),
        ({"depth": 12}, "its model cannot be built"),
    ],
)
def test_a_config_of_another_network(tmp_path, config, words):
    path = save(tmp_path / "c", SmallDiT())
    rewrite(path, {"class": "network_tools:SmallDiT", "config": config})
    with pytest.raises(InputError) as caught:
        load(path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_factory_of_something_else(tmp_path):
    path = save(tmp_path / "c", Plain())
    with pytest.raises(InputError, match="model makes a dict; expected an nn.Module"):
        load(path, model=dict)
    with pytest.raises(InputError, match="holds the weights of another network"):
        load(path, model=lambda: Plain(width=4))


def test_a_diffusers_folder_says_what_it_holds(tmp_path):
    diffusers_unet().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no model="):
        load(tmp_path, model=diffusers_unet)


class Cursed(nn.Module):
    """Two weights, one name without wrappers."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(1, 1)
        self.a.module = nn.Linear(1, 1)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Cursed(), "have one name"),
        (nn.LazyLinear(2), "no shape yet"),
        (Plain().to("meta"), "meta device"),
    ],
)
def test_weights_that_no_file_holds_are_refused(tmp_path, model, words):
    with pytest.raises(InputError, match=words):
        save(tmp_path / "c", model)
    assert not list(tmp_path.iterdir())
