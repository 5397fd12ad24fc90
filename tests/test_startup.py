"""What importing fastdiff loads: nothing before it is used, then torch, and nothing rarer."""

import ast
import os
import resource
import subprocess
import sys

import pytest

import fastdiff
from paths import ROOT

# Each costs a tenth of a second to two seconds.
LATER = (
    "torch._dynamo torch._inductor sympy triton diffusers PIL matplotlib sklearn tensorboard "
    "filelock"
)
EVERY = f"torch numpy safetensors {LATER}"
# What Python has on some systems only.
OF_ONE_SYSTEM = {"fcntl", "grp", "msvcrt", "posix", "pwd", "resource", "termios", "winreg"}

CODE = """
import sys
{start}
loaded = [name for name in {later!r}.split() if name in sys.modules]
print("loaded:", *loaded)
"""
CLI = "from fastdiff.cli import build_parser; "
SAMPLED = """
import tempfile, fastdiff
arguments = dict(in_channels=1, model_channels=32, out_channels=1, num_res_blocks=1)
arguments |= dict(attention_resolutions=(), channel_mult=(1,), num_classes=3)
with tempfile.TemporaryDirectory() as folder:
    diffusion = fastdiff.create_diffusion(steps=100)
    fastdiff.save(folder, fastdiff.UNet(**arguments), diffusion=diffusion)
    found = fastdiff.load(folder)
import torch
kwargs = {"y": torch.tensor([0, 2])}
fastdiff.Sampler(found.model, found.diffusion, steps=3).sample((2, 1, 8, 8), model_kwargs=kwargs)
"""


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("start", "later"),
    [
        ("import fastdiff", EVERY),
        (CLI + "build_parser([]).format_help()", EVERY),
        ("import fastdiff; fastdiff.Sampler", LATER),
        (CLI + "build_parser().format_help()", LATER),
        (SAMPLED, LATER),
    ],
    ids=["import", "help", "use", "commands", "sample"],
)
def test_what_only_some_calls_need_is_not_loaded(start, later):
    code = CODE.format(start=start, later=later)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["loaded:"]


def of_children() -> float:
    """Seconds of CPU: on a busy machine the clock says little."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_the_version_is_one_and_needs_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch was loaded')")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    before = of_children()
    done = subprocess.run(
        [sys.executable, "-m", "fastdiff", "--version"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert (done.returncode, done.stdout) == (0, f"fastdiff {fastdiff.__version__}\n"), done.stderr
    assert of_children() - before < 1


def test_the_public_names_are_listed_and_no_others_are_found():
    assert set(fastdiff.__all__) <= set(dir(fastdiff))
    assert all(getattr(fastdiff, name) is not None for name in fastdiff.__all__)
    assert fastdiff.ops.q_sample is not None
    with pytest.raises(AttributeError, match="has no attribute 'Samples'"):
        fastdiff.Samples  # noqa: B018


def test_what_is_imported_exists_on_every_system():
    """macOS and Windows too; inside functions a module of one system may be asked for."""
    found = set()
    for path in [*(ROOT / "fastdiff").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add((node.module or "").partition(".")[0])
    assert {"os", "torch"} <= found and not found & OF_ONE_SYSTEM
