"""What importing fastdiff loads: torch, and nothing that only some calls need."""

import subprocess
import sys

import pytest

# Each costs a tenth of a second to two seconds.
LATER = "torch._dynamo torch._inductor sympy triton diffusers PIL matplotlib sklearn tensorboard"

CODE = """
import sys
{start}
loaded = [name for name in {later!r}.split() if name in sys.modules]
print("loaded:", *loaded)
"""


@pytest.mark.seconds
@pytest.mark.parametrize(
    "start",
    ["import fastdiff", "from fastdiff.cli import build_parser; build_parser().format_help()"],
    ids=["import", "help"],
)
def test_what_only_some_calls_need_is_not_loaded(start):
    code = CODE.format(start=start, later=LATER)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["loaded:"]
