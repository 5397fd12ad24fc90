"""Checkpoint directories: what comes back, what a crash leaves, what a damaged one says."""

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import fastdiff
from fastdiff import EMA, UNet, load, save
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.published import load_published
from fastdiff.errors import InputError
from fastdiff.process.gaussian import create_diffusion
from fastdiff.process.variance_exploding import VarianceExploding, geometric_sigmas
from patience import WAIT

TINY = {
    "in_channels": 1,
    "model_channels": 8,
    "out_channels": 2,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (1, 2),
}


def tiny(**changes) -> UNet:
    model = UNet(**{**TINY, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def same_weights(model: UNet, state) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def entries(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture
def saved(tmp_path):
    """A checkpoint with two averages, none of them like the weights."""
    model = tiny(num_classes=3, null_class=True)
    ema = EMA(model, (0.5, 0.9))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    ema.update()
    ema.updates = 100  # as many as make an average that has forgotten its start
    diffusion = create_diffusion(steps=20, noise_schedule="cosine", learn_sigma=True)
    info = {"image_size": [8, 8], "class_names": ["a", "b", "c"]}
    path = save(tmp_path / "run" / "last", model, diffusion=diffusion, ema=ema, step=7, info=info)
    return path, model, ema


def test_round_trip(saved):
    path, model, ema = saved
    for weights, name, state in (
        ("model", "model", model.state_dict()),
        ("ema", "0.9", ema.state_dict(0.9)),
        ("0.5", "0.5", ema.state_dict(0.5)),
        (0.5, "0.5", ema.state_dict(0.5)),
    ):
        loaded = load(path, weights=weights)
        assert loaded.weights == name and same_weights(loaded.model, state)
        assert not loaded.model.training
    assert loaded.model.config == model.config and loaded.model.null_label == 3
    assert loaded.step == 7 and loaded.info["class_names"] == ["a", "b", "c"]
    assert loaded.ema_rates == ["0.5", "0.9"] and loaded.path == path
    assert loaded.diffusion.num_timesteps == 20
    assert loaded.diffusion.var_type == "learned_range"


def test_files_on_disk(saved):
    path, model, _ = saved
    assert entries(path) == [
        "config.json",
        "ema_0.5.safetensors",
        "ema_0.9.safetensors",
        "model.safetensors",
    ]
    config = json.loads((path / "config.json").read_text())
    assert config["format"] == 1 and config["model"] == model.config


def test_channels_last_weights_are_stored_in_logical_order(tmp_path):
    """Whatever the layout in memory, the file holds NCHW values under the published names."""
    model = tiny()
    save(tmp_path / "a", model)
    save(tmp_path / "b", model.to(memory_format=torch.contiguous_format))
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_minimal_checkpoint(tmp_path):
    model = tiny()
    loaded = load(save(str(tmp_path / "c"), model))
    assert loaded.weights == "model" and same_weights(loaded.model, model.state_dict())
    assert (loaded.diffusion, loaded.step, loaded.info) == (None, None, {})


@pytest.mark.seconds
@pytest.mark.parametrize(
    "process", [VarianceExploding(geometric_sigmas(10)), fastdiff.EDM(10, sigma_data=0.4)]
)
def test_a_process_of_another_kind_comes_back_and_samples(process, tmp_path):
    model = tiny(out_channels=1).eval()
    loaded = load(save(tmp_path / "c", model, diffusion=process.respace("4")))
    assert type(loaded.diffusion) is type(process)
    assert loaded.diffusion.to_config() == process.respace("4").to_config()
    sampler = fastdiff.Sampler(model, process, steps=4)
    again = fastdiff.Sampler(loaded.model, loaded.diffusion)
    assert torch.equal(again.sample((2, 1, 8, 8), seed=3), sampler.sample((2, 1, 8, 8), seed=3))


def test_extra_files(tmp_path):
    tensors = {"step": torch.tensor(3), "moments": torch.randn(4, 2)}
    path = save(
        tmp_path / "c",
        tiny(),
        extra_tensors={"trainer": tensors},
        extra_json={"trainer": {"position": 12}},
    )
    assert checkpoint.load_json(path, "trainer") == {"position": 12}
    back = checkpoint.load_tensors(path, "trainer")
    assert all(torch.equal(back[name], value) for name, value in tensors.items())


def test_saving_again_replaces_the_whole_directory(tmp_path):
    path = save(tmp_path / "c", tiny(), extra_json={"old": 1})
    model = tiny()
    save(path, model, step=2)
    assert entries(path) == ["config.json", "model.safetensors"]
    assert same_weights(load(path).model, model.state_dict()) and entries(tmp_path) == ["c"]


# Damage


def damaged(path: Path, message: str, **options) -> None:
    with pytest.raises(InputError) as caught:
        load(path, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_truncated_weights(saved, keep):
    path, _, _ = saved
    file = path / "ema_0.9.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    damaged(path, "ema_0.9.safetensors is damaged")


def test_missing_weights(saved):
    (saved[0] / "ema_0.9.safetensors").unlink()
    damaged(saved[0], "ema_0.9.safetensors is missing")


def test_missing_config(saved):
    (saved[0] / "config.json").unlink()
    damaged(saved[0], "is not a checkpoint directory: it has no config.json")


def test_no_directory(tmp_path):
    damaged(tmp_path / "none", "there is no such directory")


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json is not valid JSON"),
        ("[]", "config.json is not a fastdiff checkpoint's: it has no format"),
        ('{"format": 1}', "config.json: its model cannot be None"),
        ('{"format": 9, "model": {}}', "config.json has format 9; this version reads 1"),
        ('{"format": 1, "model": {"depth": 3}}', "config.json: its model cannot be built"),
    ],
)
def test_damaged_config(saved, text, message):
    (saved[0] / "config.json").write_text(text)
    damaged(saved[0], message, weights="model")


def test_damaged_diffusion(saved):
    config = json.loads((saved[0] / "config.json").read_text())
    config["diffusion"] = {"nonsense": 1}
    (saved[0] / "config.json").write_text(json.dumps(config))
    damaged(saved[0], "config.json: its diffusion cannot be built")


def test_unknown_weights(saved):
    damaged(saved[0], "has no weights '0.7'; there are model, 0.5, 0.9", weights="0.7")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_channels": 16}, "time_embed.0.weight is (32, 8), this network has (64, 16)"),
        ({"num_res_blocks": 2}, "missing, such as input_blocks."),
        ({"attention_resolutions": []}, "unexpected, such as input_blocks.3.1.norm"),
    ],
)
def test_weights_of_another_network(saved, changes, message):
    path, _, _ = saved
    config = json.loads((path / "config.json").read_text())
    config["model"] |= changes
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as caught:
        load(path)
    text = str(caught.value)
    assert "ema_0.9.safetensors holds the weights of another network" in text
    assert "\n" not in text and message in text


# Saving that fails


def test_what_is_no_module(tmp_path):
    with pytest.raises(InputError, match="cannot save a function: expected an nn.Module"):
        save(tmp_path / "c", lambda x, t: x)


def test_target_is_a_file(tmp_path):
    (tmp_path / "c").write_text("precious")
    with pytest.raises(InputError, match="it is a file, not a directory"):
        save(tmp_path / "c", tiny())
    assert (tmp_path / "c").read_text() == "precious"


def in_a_new_process(code: str, *arguments: Path, **options) -> subprocess.CompletedProcess:
    prelude = f"""
    import os, signal, sys, torch
    from fastdiff import UNet, save
    from fastdiff.checkpoints import checkpoint
    model = UNet(**{TINY!r})
    target = sys.argv[1]
    """
    code = textwrap.dedent(prelude) + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=WAIT,
        **options,
    )


@pytest.mark.seconds
def test_full_disk_costs_nothing(tmp_path):
    """No file may grow past 16 KiB: every write fails as on a full disk."""
    model = tiny()
    path = save(tmp_path / "c", model, step=1)
    done = in_a_new_process(
        """
        try:
            save(target, model, step=2)
        except OSError as error:
            print("OSError:", error)
        """,
        path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384)),
    )
    assert done.stdout.startswith("OSError:") and "model.safetensors" in done.stdout, done.stderr
    assert entries(tmp_path) == ["c"]
    loaded = load(path)
    assert loaded.step == 1 and same_weights(loaded.model, model.state_dict())


def killed_at_the_sync(number: int) -> str:
    """Code that kills its process where the n-th file or directory reaches the disk."""
    return f"""
        syncs = 0
        def sync(descriptor):
            global syncs
            syncs += 1
            if syncs == {number}:
                os.kill(os.getpid(), signal.SIGKILL)
        os.fsync = sync
    """


KILLED_IN = {
    "the weights": """
        import safetensors.torch
        def half(tensors, path, **options):
            open(path, "wb").write(bytes(100))
            os.kill(os.getpid(), signal.SIGKILL)
        safetensors.torch.save_file = half
    """,
    "the weights' sync": killed_at_the_sync(1),
    "the config's sync": killed_at_the_sync(2),
    "the directory's sync": killed_at_the_sync(3),
    "the rename": """
        from pathlib import Path
        rename = Path.rename
        def half(self, target):
            rename(self, target)
            os.kill(os.getpid(), signal.SIGKILL)
        Path.rename = half
    """,
}


@pytest.mark.seconds
@pytest.mark.sample(2)
@pytest.mark.parametrize("moment", KILLED_IN)
def test_kill_in_mid_write_keeps_the_older_checkpoint(tmp_path, moment):
    model = tiny()
    path = save(tmp_path / "c", model, step=1)
    done = in_a_new_process(textwrap.dedent(KILLED_IN[moment]) + "\nsave(target, model)", path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(entries(tmp_path)) == 2, "the killed process should have left something"

    loaded = load(path)
    assert loaded.step == 1 and same_weights(loaded.model, model.state_dict())

    save(tmp_path / "d", model, step=2)  # a save beside it removes what was half written
    leftovers = [name for name in entries(tmp_path) if ".saving-" in name]
    assert not leftovers and load(path).step == 1
    save(path, model, step=3)
    assert entries(tmp_path) == ["c", "d"] and load(path).step == 3


@pytest.mark.seconds
def test_kill_between_rename_and_clean_up_keeps_the_newer_checkpoint(tmp_path):
    model = tiny()
    path = save(tmp_path / "c", model, step=1)
    code = """
        import shutil
        shutil.rmtree = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
        save(target, model, step=2)
    """
    done = in_a_new_process(code, path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert load(path).step == 2
    save(path, model, step=3)
    assert entries(tmp_path) == ["c"] and load(path).step == 3


def test_files_of_a_save_that_is_running_are_left_alone(tmp_path):
    """Two processes may save side by side; only what a dead one left is rubbish."""
    host = os.uname().nodename
    living = tmp_path / f".other.saving-{host}-{os.getppid()}"
    elsewhere = tmp_path / ".other.saving-another-machine-1"
    for folder in (living, elsewhere):
        folder.mkdir()
    save(tmp_path / "c", tiny())
    assert living.is_dir() and elsewhere.is_dir()


# Published state dicts


def test_published_state_dict(tmp_path):
    model = tiny()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    for source in (tmp_path / "model.pt", str(tmp_path / "model.pt"), model.state_dict()):
        loaded = load_published(source, **TINY)
        assert same_weights(loaded, model.state_dict()) and not loaded.training


def test_published_preset_with_overrides():
    model = UNet.from_preset("digits", model_channels=32)
    loaded = load_published(model.state_dict(), preset="digits", model_channels=32)
    assert same_weights(loaded, model.state_dict())


def test_published_state_dict_in_a_wrappers_file(tmp_path):
    model = tiny()
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"net": state}, tmp_path / "model.pt")
    for source in (tmp_path / "model.pt", {"net": state}):
        with pytest.raises(InputError, match=r"is inside: give key='net' strip='module\.'"):
            load_published(source, **TINY)
        loaded = load_published(source, key="net", strip="module.", **TINY)
        assert same_weights(loaded, model.state_dict())


class Trap:
    def __reduce__(self):
        return os.system, ("touch sprung",)


@pytest.mark.parametrize("content", ["text", "truncated", "pickle", "list"])
def test_not_a_published_state_dict(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pt"
    torch.save(
        {"text": {}, "pickle": Trap(), "list": [1, 2]}.get(content, tiny().state_dict()), path
    )
    if content == "text":
        path.write_text("<html>404</html>")
    if content == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError) as caught:
        load_published(path, **TINY)
    assert "model.pt is not a" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "sprung").exists()


def test_published_file_is_missing(tmp_path):
    with pytest.raises(InputError, match="there is no such file"):
        load_published(tmp_path / "model.pt", **TINY)


def test_published_weights_of_another_network():
    with pytest.raises(InputError) as caught:
        load_published(tiny().state_dict(), **{**TINY, "num_classes": 3})
    assert "1 missing, such as label_emb.weight" in str(caught.value)


def test_files_are_as_readable_as_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        path = save(tmp_path / "run", tiny())
    finally:
        os.umask(before)
    assert {entry.stat().st_mode & 0o777 for entry in path.iterdir()} == {0o644}
