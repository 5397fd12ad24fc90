"""Saving killed at any system call, disks that fill, folders that are not ours, garbled files."""

import errno
import json
import os
import resource
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from extent import examples
from fastdiff import EMA, Checkpoint, UNet, load, save
from fastdiff.errors import InputError
from json_values import json_values
from patience import WAIT
from small_disk import small_disk

TINY = (1, 8, 1, 1, ())
SUFFIX = ".saving-"


def network(value: float = 1.0, **options) -> UNet:
    model = UNet(*TINY, channel_mult=(1,), **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def assert_holds(path: Path, step: int, value: float) -> None:
    loaded = load(path, weights="model")
    assert loaded.step == step
    assert all(bool((p == value).all()) for p in loaded.model.parameters())


# Dies at the n-th call, for n = 1, 2, ... until a save lives through all of its calls. A forked
# child saves step 2 with weights of 2 over a checkpoint of step 1; the parent prints what is there.
KILL_EVERYWHERE = """
    import itertools, json, os, shutil, signal, sys
    import safetensors.torch
    import torch
    from fastdiff import EMA, UNet, load, save

    torch.set_num_threads(1)
    parent = sys.argv[1]

    def network(value):
        model = UNet(1, 8, 1, 1, (), channel_mult=(1,))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
        return model

    def die_at(point):
        calls = itertools.count(1)

        def wrap(owner, name):
            function = getattr(owner, name)

            def counted(*args, **kwargs):
                if next(calls) == point:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            setattr(owner, name, counted)

        save_file = safetensors.torch.save_file

        def half_written(tensors, path, **options):
            save_file(tensors, path, **options)
            if next(calls) == point:
                os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        safetensors.torch.save_file = half_written
        for name in ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir"):
            wrap(os, name)
        return calls

    old, new = network(1.0), network(2.0)
    averages = EMA(new, (0.9,))
    for point in itertools.count(1):
        target = os.path.join(parent, f"at_{point}", "last")
        save(target, old, step=1)
        child = os.fork()
        if child == 0:
            die_at(point)
            save(target, new, ema=averages, step=2, extra_json={"trainer": list(range(9))})
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, status
            break
        found = load(target, weights="model")
        values = {float(v) for p in found.model.parameters() for v in p.detach().unique()}
        save(target, old, step=3)
        left = sorted(os.listdir(os.path.dirname(target)))
        after = load(target).step
        print(json.dumps([os.WTERMSIG(status), found.step, sorted(values), left, after]))
"""


@pytest.mark.seconds
def test_a_save_killed_at_any_call_leaves_the_older_or_the_newer_whole(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILL_EVERYWHERE), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=WAIT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    # 2 × (write, fsync), 2 × fsync of JSON, mkdir, fsync and 2 renames come before the end.
    assert len(outcomes) >= 10
    for signal_number, step, values, left, after in outcomes:
        assert signal_number == 9
        assert step in (1, 2) and values == [float(step)]
        assert left == ["last"] and after == 3  # the next save cleans up
    steps = [step for _, step, *_ in outcomes]
    assert steps == sorted(steps) and set(steps) == {1, 2}


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path, "256k"):
        yield tmp_path


def test_a_disk_goes_though_a_file_is_open(tmp_path):
    with small_disk(tmp_path, "64k"):
        file = (tmp_path / "open").open("w")
    with file:
        assert not tmp_path.is_mount()


@pytest.mark.parametrize("fills", ["weights", "average", "text"])
def test_a_full_disk_costs_nothing(disk, fills):
    target = disk / "last"
    save(target, network(), step=1)
    options = {
        "weights": {"extra_tensors": {"a": {"x": torch.zeros(100_000)}}},
        "average": {"ema": EMA(network(2.0), [i / 10 for i in range(1, 10)])},
        "text": {"extra_json": {"a": "x" * 300_000}},
    }[fills]
    with pytest.raises(OSError, match="No space left") as caught:
        save(target, network(2.0), step=2, **options)
    assert caught.value.errno == errno.ENOSPC
    assert [entry.name for entry in disk.iterdir()] == ["last"]
    assert_holds(target, 1, 1.0)
    save(target, network(3.0), step=3)
    assert_holds(target, 3, 3.0)


@pytest.mark.parametrize("limit", [1, 20_000, 100_000])
def test_a_file_that_may_not_grow_costs_nothing(tmp_path, limit):
    # Where no file system can be mounted: the weights need 42 kB, the text 300 kB.
    target = tmp_path / "last"
    save(target, network(), step=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError) as caught:
            save(target, network(2.0), step=2, extra_json={"a": "x" * 300_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert [entry.name for entry in tmp_path.iterdir()] == ["last"]
    assert_holds(target, 1, 1.0)


def test_a_folder_of_other_things_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("ten years of work")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="it holds other files, such as config.json; give a new"):
        save(tmp_path, network())
    assert (tmp_path / "thesis.tex").read_text() == "ten years of work"
    (tmp_path / "empty").mkdir()
    assert_holds(save(tmp_path / "empty", network(), step=1), 1, 1.0)


def test_values_without_a_json_form_are_refused_before_anything_is_written(tmp_path):
    save(tmp_path / "last", network(), step=1)
    with pytest.raises(InputError, match="cannot save config.json: .*Tensor is not JSON"):
        save(tmp_path / "last", network(2.0), step=2, info={"mean": torch.zeros(1)})
    with pytest.raises(InputError, match="cannot save trainer.json: .*bytes is not JSON"):
        save(tmp_path / "last", network(2.0), step=2, extra_json={"trainer": b"x"})
    assert [entry.name for entry in tmp_path.iterdir()] == ["last"]
    assert_holds(tmp_path / "last", 1, 1.0)


def test_threads_that_save_side_by_side_do_not_clear_each_other_away(tmp_path, monkeypatch):
    from fastdiff.checkpoints import weights

    write, first_writes, go_on = weights._write_tensors, threading.Event(), threading.Event()

    def slow(path, tensors):
        write(path, tensors)
        if ".first" in str(path):
            first_writes.set()
            assert go_on.wait(30)

    monkeypatch.setattr(weights, "_write_tensors", slow)
    first = threading.Thread(target=save, args=(tmp_path / "first", network()), kwargs={"step": 1})
    first.start()
    assert first_writes.wait(30)
    save(tmp_path / "second", network(2.0), step=2)
    go_on.set()
    first.join()
    assert_holds(tmp_path / "first", 1, 1.0)
    assert_holds(tmp_path / "second", 2, 2.0)


def test_rubbish_of_a_dead_process_with_our_number_is_removed(tmp_path):
    # Containers number their processes alike, so a killed run and this one may share a number.
    host = os.uname().nodename
    (tmp_path / f".old{SUFFIX}{host}-{os.getpid()}").mkdir()
    save(tmp_path / "last", network())
    assert [entry.name for entry in tmp_path.iterdir()] == ["last"]


def one_line(error: InputError) -> str:
    assert "\n" not in str(error)
    return str(error)


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("intact") / "last", network(), step=1)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(0, 4000) | st.integers(0, 2**20))
def test_weights_cut_anywhere_name_the_file(intact, tmp_path_factory, size):
    original = (intact / "model.safetensors").read_bytes()
    size %= len(original)
    folder = tmp_path_factory.mktemp("cut")
    (folder / "config.json").write_bytes((intact / "config.json").read_bytes())
    (folder / "model.safetensors").write_bytes(original[:size])
    with pytest.raises(InputError) as caught:
        load(folder)
    assert str(folder / "model.safetensors") in one_line(caught.value)


@pytest.mark.seconds
@settings(
    max_examples=examples(50, of=150),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    part=st.sampled_from(["format", "model", "diffusion", "step", "info", "ema"]),
    inner=st.none() | st.sampled_from(sorted(network().config)),
    value=json_values(5),
)
@example(part="ema", inner=None, value=["fast"])
@example(part="ema", inner=None, value=[None])
@example(part="model", inner="channel_mult", value=2)
@example(part="model", inner="channel_mult", value=["a"])
@example(part="model", inner="num_classes", value=2.5)
@example(part="model", inner="in_channels", value=10**18)
@example(part="model", inner="dims", value=[2])
@example(part="diffusion", inner=None, value={"betas": 3})
def test_any_value_in_config_json_loads_or_names_the_file(intact, tmp_path, part, inner, value):
    config = json.loads((intact / "config.json").read_text())
    if part == "model" and inner is not None:
        config["model"][inner] = value
    else:
        config[part] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((intact / "model.safetensors").read_bytes())
    try:
        assert isinstance(load(tmp_path), Checkpoint)
    except InputError as error:
        assert str(tmp_path) in one_line(error)


@pytest.mark.parametrize("text", [b"", b"\xff\xfe\x00", b"[" * 5000, b'{"format": 1', b"null"])
def test_config_that_is_no_json_names_the_file(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    assert str(tmp_path / "config.json") in one_line(caught.value)


@pytest.mark.parametrize("format_number", [2, 0, "1", None, [1]])
def test_other_formats_say_which_one_is_read(tmp_path, format_number):
    # A later format may keep nothing of today's layout but this number.
    (tmp_path / "config.json").write_text(json.dumps({"format": format_number, "networks": []}))
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    assert f"has format {format_number!r}; this version reads 1" in one_line(caught.value)


@pytest.mark.parametrize("weights", ["0.5", 0.5, "best", "", "2"])
def test_weights_that_are_not_there_list_what_is(intact, weights):
    with pytest.raises(InputError) as caught:
        load(intact, weights=weights)
    assert one_line(caught.value).endswith(f"has no weights '{weights}'; there are model")
