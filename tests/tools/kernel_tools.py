"""What the kernels' tests share."""

import contextlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdiff.ops import backends, native
from fastdiff.ops.normal import normal
from fastdiff.ops.normal.op import FAST_ERROR
from machine_code import instructions
from paths import TOOLS

EMULATED = native.emulates_cuda()  # a thousand times slower than the kernels of the CPU
ISAS = native.library().supported_isas()[-1 if EMULATED else 0 :]


# The body of a test for GPUs runs on the CPU as well: a fault of its own shows without one.
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def _misaligned(x):
    buffer = x.new_empty(x.numel() + 1)
    buffer[1:] = x.flatten()
    return buffer[1:].view(x.shape)


def _rows(x):
    wider = x.new_full((*x.shape[:-1], x.shape[-1] + 3), float("nan"))
    wider[..., 1:-2] = x
    return wider[..., 1:-2]


def _channels_last(x):
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


# The same numbers, laid out in memory as named.
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": _channels_last,
    "misaligned": _misaligned,
    "transposed": lambda x: x.mT.contiguous().mT,
    "strided": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "rows": _rows,
}


def noise_of(shape, **options):
    """``normal``, by the GPU's kernels where one of these is named: what the operations draw."""
    named = backends.named() if backends.named() in ("triton", "cuda") else None
    return normal(shape, **options, backend=named)


def assert_drawn_alike(actual, expected):
    """Normals that a GPU drew, up to their bound and a rounding of the dtype."""
    assert actual.dtype == expected.dtype
    rounding = torch.finfo(actual.dtype).eps if actual.dtype != torch.float32 else 0.0
    torch.testing.assert_close(actual, expected, rtol=rounding, atol=FAST_ERROR)


def agreements(script, *arguments):
    """How often a script of this folder, which runs Triton's interpreter, says that two agree."""
    command = [sys.executable, str(TOOLS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.count("agree")


def examples(count):
    """How many examples hypothesis draws."""
    return count // 4 if EMULATED else count


@contextlib.contextmanager
def forced_isa(name):
    """One of ``ISAS`` is in use; a test with the argument ``isa`` runs with each (conftest.py)."""
    library = native.library()
    before = library.current_isa()
    library.set_isa(name)
    try:
        yield
    finally:
        library.set_isa(before)


def each_isa():
    """``ISAS``, each being in use while it is looped over; where a backend is named that has none,
    its name."""
    if backends.named() not in (None, "native"):
        yield backends.named()
        return
    for name in ISAS:
        with forced_isa(name):
            yield name


@contextlib.contextmanager
def poisoned_outputs():
    """What torch.empty_like returns is full of NaN."""
    original = torch.empty_like

    def poisoned(*args, **kwargs):
        return original(*args, **kwargs).fill_(float("nan"))

    torch.empty_like = poisoned
    try:
        yield
    finally:
        torch.empty_like = original


@pytest.fixture(scope="module", autouse=True)
def scratch_of_nan():
    """A call's scratch memory on the CPU is of the size that it asks for, and full of NaN: what it
    reads it must have written. A module that imports this has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "borrow", lambda floats: torch.full((floats,), float("nan")))
        patch.setattr(native, "give_back", lambda workspace: None)
        yield


def compile_for(capability, kernel, types, constants, aligned=(), **options):
    """A Triton kernel compiled with no GPU. ``types``: what is no int32; None is absent;
    ``aligned``: what 16 divides; ``options``: Triton's own."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {"BLOCK": 256} | constants
    constants |= {name: None for name, kind in types.items() if kind is None}
    signature = dict.fromkeys(kernel.arg_names, "i32") | types
    signature |= dict.fromkeys(constants, "constexpr")
    known = [kernel.arg_names.index(name) for name in aligned if name not in constants]
    attributes = {(place,): [["tt.divisibility", 16]] for place in known}
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"enable_fp_fusion": False} | options,
    )


def dumped(compiled, folder, option):
    """What cuobjdump prints of a compiled Triton kernel."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    return subprocess.run(
        [tools / "cuobjdump", option, cubin], capture_output=True, text=True, check=True
    ).stdout


def instructions_drawing(kernel, types, flags, aligned, folder):
    """An element's, of a kernel that draws noise for one run of a sample, on Hopper: the whole
    program's, divided by the elements of a thread."""
    from fastdiff.kernels.elementwise import BLOCK, WARPS

    compiled = compile_for(90, kernel, types, flags | {"BLOCK": BLOCK}, aligned, num_warps=WARPS)
    elements = 4 * BLOCK / (32 * WARPS)
    return len(instructions(dumped(compiled, folder, "-sass"))) / elements


def spilled(compiled, folder):
    """The bytes of local memory that ptxas gave a thread: registers that did not suffice."""
    usage = dumped(compiled, folder, "-res-usage")
    stack, local = re.search(r"STACK:(\d+) .*LOCAL:(\d+)", usage).groups()
    return int(stack) + int(local)
