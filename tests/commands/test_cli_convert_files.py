"""fastdiff convert: where in a file the network lies, and what a file holds instead."""

import argparse
import re
import shlex
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert_tools import FLAGS, SMALL, convert, refused, saved, small
from fastdiff import load
from fastdiff.checkpoints.published import load_published


def with_prefix(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


LAYOUTS = {
    "": lambda state: state,
    "--strip module.": lambda state: with_prefix("module.", state),
    "--strip _orig_mod.": lambda state: with_prefix("_orig_mod.", state),
    "--strip module._orig_mod.": lambda state: with_prefix("module._orig_mod.", state),
    "--strip module. ": lambda state: {
        **with_prefix("module.", state),
        "n_averaged": torch.tensor(3),
        "betas": torch.zeros(4),
    },
    "--key state_dict": lambda state: {"state_dict": state, "epoch": 3, "lr": 0.1},
    "--key state_dict --strip model.": lambda state: {
        "state_dict": with_prefix("model.", state),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(1)}}}],
        "pytorch-lightning_version": "2.5",
    },
    "--key ema.0.9999": lambda state: {"ema": {"0.9999": state}, "step": torch.tensor(1)},
    "--key 0.9999": lambda state: {0.9999: state},
    "--key a.b.c": lambda state: {"a": {"b": {"c": state}}},
    "--key 'my model'": lambda state: {"my model": state},
}


@pytest.mark.seconds
@pytest.mark.sample(5)
@pytest.mark.parametrize(
    ("given", "suffix"),
    [(given, "pt") for given in LAYOUTS]
    + [(given, "safetensors") for given in LAYOUTS if "--key" not in given],
)
def test_the_network_is_found_where_the_error_says(folder, capsys, given, suffix):
    """The message for no flags is exactly the flags that read the file."""
    model = small()
    content, name = LAYOUTS[given](model.state_dict()), f"theirs.{suffix}"
    if suffix == "pt":
        torch.save(content, name)
    else:
        flat = {k: tensor.contiguous() for k, tensor in content.items()}
        safetensors.torch.save_file(flat, name)
    if given:
        message = refused(capsys, *FLAGS, model=name)
        assert message.endswith(
            f"{name} is not the state dict itself; the network is inside: give {given.strip()}"
        )
    assert convert(*FLAGS, *shlex.split(given), model=name) == 0
    found = load("out").model.state_dict()
    assert all(torch.equal(found[k], tensor) for k, tensor in model.state_dict().items())
    words = shlex.split(given)
    place = {flag.strip("-"): value for flag, value in zip(words[::2], words[1::2], strict=True)}
    again = load_published(name, **place, **SMALL).state_dict()
    assert all(torch.equal(again[k], found[k]) for k in found)


def test_a_network_and_its_average_in_one_file(folder, capsys):
    model, average = small(0), small(1)
    both = {"model": model.state_dict(), "ema": with_prefix("module.", average.state_dict())}
    torch.save(both, "both.pt")
    message = refused(capsys, *FLAGS, model="both.pt")
    assert message.endswith("give --key model, or --key ema --strip module.")
    flags = [*FLAGS, "--key", "model", "--ema", "both.pt", "--ema-rate", "0.999"]
    assert "is the file of the network; say with --ema-key" in refused(
        capsys, *flags, model="both.pt"
    )
    message = refused(capsys, *flags, "--ema-key", "ema", model="both.pt")
    assert message.endswith("--ema-key model --ema-strip '', or --ema-key ema --ema-strip module.")
    place = ["--ema-key", "ema", "--ema-strip", "module."]
    assert convert(*flags, *place, model="both.pt") == 0
    for weights, one in (("model", model), ("0.999", average)):
        found = load("out", weights=weights).model.state_dict()
        assert all(torch.equal(found[k], tensor) for k, tensor in one.state_dict().items())


@pytest.mark.seconds
def test_averages_lie_where_the_network_does_unless_said(folder, capsys):
    models = [small(seed) for seed in range(3)]
    names = ["theirs.pt", "ema_0.9_000100.pt", "ema_0.99_000100.pt"]
    for name, model in zip(names, models, strict=True):
        torch.save({"state_dict": with_prefix("module.", model.state_dict())}, name)
    flags = [*FLAGS, "--key", "state_dict", "--strip", "module"]
    flags += [part for name in names[1:] for part in ("--ema", name)]
    assert convert(*flags, model="theirs.pt") == 0
    for weights, model in zip(("model", 0.9, 0.99), models, strict=True):
        found = load("out", weights=weights).model.state_dict()
        assert all(torch.equal(found[k], tensor) for k, tensor in model.state_dict().items())
    torch.save(models[2].state_dict(), names[2])
    message = refused(capsys, *flags, "--out", "other", model="theirs.pt")
    assert "ema_0.99_000100.pt has no key 'state_dict'" in message
    assert message.endswith("give --ema-key '' --ema-strip ''")
    places = [
        "--ema-key",
        "state_dict",
        "--ema-key",
        "",
        "--ema-strip",
        "module.",
        "--ema-strip",
        "",
    ]
    assert convert(*flags, *places, "--out", "other", model="theirs.pt") == 0
    message = refused(capsys, *flags, *places, "--ema-key", "", "--out", "third", model="theirs.pt")
    assert "3 --ema-key for 2 --ema" in message
    message = refused(capsys, *FLAGS, "--ema-key", "ema", "--out", "third", model=names[2])
    assert "1 --ema-key for 0 --ema" in message
    twice = ["--ema", names[1], "--ema", names[1], "--ema-rate", "0.9", "--ema-rate", "0.99"]
    prefixes = ["--ema-strip", "module", "--ema-strip", "module."]
    message = refused(capsys, *flags[:-4], *twice, *prefixes, "--out", "third", model=names[0])
    assert "two --ema are the same average of ema_0.9_000100.pt" in message


@pytest.mark.parametrize(
    ("content", "flags", "words"),
    [
        (
            lambda s: {"state_dict": s},
            ["--key", "model"],
            "no key 'model'; .* give --key state_dict",
        ),
        (lambda s: s, ["--key", "ema"], "has no key 'ema'; .* give no --key and no --strip"),
        (lambda s: s, ["--strip", "module."], "no name begins with 'module.'; .* no --strip"),
        (
            lambda s: {"step": 3, "ema": {"decay": 0.9, "shadow_params": list(s.values())}},
            [],
            r"not a state dict of tensors: it holds a int under step, a float under ema.decay, "
            r"\d+ tensors without names under ema.shadow_params",
        ),
        (
            lambda s: {"gan": {"conv.weight": torch.zeros(1)}},
            [],
            "it holds 1 named tensors under gan",
        ),
        (lambda s: {"model": s, "n": 1}, ["--key", "n"], "give --key model"),
        (lambda s: small(), [], "holds a pickled fastdiff.models.unet.UNet, .* state_dict"),
        (lambda s: {"args": argparse.Namespace()}, [], "holds a pickled argparse.Namespace"),
        (lambda s: {"time_embedding.linear_1.weight": torch.zeros(1)}, [], "diffusers' names"),
    ],
)
def test_what_a_file_holds_instead_is_said(folder, capsys, content, flags, words):
    torch.save(content(small().state_dict()), "theirs.pt")
    message = refused(capsys, *FLAGS, *flags, model="theirs.pt")
    assert re.search(words, message), message


def test_a_directory_is_no_file(folder, capsys):
    Path("theirs").mkdir()
    assert "theirs is a directory; give a file of weights" in refused(
        capsys, *FLAGS, model="theirs"
    )


def test_a_safetensors_file_that_is_none(folder, capsys):
    Path("theirs.safetensors").write_text("<html>404</html>")
    assert "theirs.safetensors is not a safetensors file" in refused(
        capsys, *FLAGS, model="theirs.safetensors"
    )


@pytest.mark.seconds
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.data())
def test_damaged_files(tmp_path_factory, capsys, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("damaged"))
        name = saved(small())
        content = bytearray(Path(name).read_bytes())
        # The start and the end of the archive, and its pickle, are what reading stumbles over.
        del content[data.draw(st.integers(0, len(content) - 1)) :]
        for place in data.draw(st.lists(st.integers(0, 2000), max_size=5)):
            if place < len(content):
                content[place] = data.draw(st.integers(0, 255))
        Path(name).write_bytes(content)
        message = refused(capsys, *FLAGS)
        assert name in message


def test_a_file_that_is_no_state_dict(folder, capsys):
    torch.save([1, 2], "list.pt")
    assert "list.pt is not a state dict of tensors" in refused(capsys, *FLAGS, model="list.pt")
    torch.save({}, "empty.pt")
    assert "empty.pt is not a state dict of named tensors" in refused(
        capsys, *FLAGS, model="empty.pt"
    )
    assert "there is no such file" in refused(capsys, *FLAGS, model="nowhere.pt")
