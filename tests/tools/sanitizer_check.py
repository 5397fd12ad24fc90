"""Drives every native operation in a library built with AddressSanitizer and UBSan.

``python sanitizer_check.py complete | short | overflow``, as test_sanitizers.py runs it. Every
instruction set, odd shapes, all dtypes and layouts, misaligned storage, one and three threads;
torch's own allocations have guard zones too; "short" takes fewer shapes and dtypes. With "overflow"
it hands a kernel too little memory, which must not go unnoticed.
"""

import itertools
import sys

import torch

import emulated_cuda  # noqa: F401  loads the library
import fastdiff
from fastdiff import GaussianDiffusion, StepTable, ops
from fastdiff.ops import dispatch, native
from fastdiff.ops.convolution.fastest import possible
from fastdiff.ops.convolution.packed import pack
from fastdiff.ops.normal import normal as draw
from fastdiff.process.schedules import get_named_beta_schedule
from norm_cases import native_shape
from step_cases import StepCase

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 6, 7),
    (2, 34, 3, 5),
    (3, 16),
    (1, 8, 1, 1),
    (2, 10, 2, 3, 3),
    (0, 4, 3),
    (1, 4, 90, 95),
]


def random(*shape, dtype=torch.float32, offset=0):
    """Normal numbers that start ``offset`` elements into their memory and end with it."""
    size = torch.Size(shape).numel()
    return torch.randn(size + offset).to(dtype)[offset:].view(shape)


def layouts(x):
    yield x
    if x.dim() == 4:
        yield x.contiguous(memory_format=torch.channels_last)
    if x.dim() == 5:
        yield x.contiguous(memory_format=torch.channels_last_3d)


def normal():
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        for out in layouts(random(*shape, dtype=dtype, offset=1)):
            draw(shape, seed=1, step=2, out=out)


def group_norm_silu():
    extras = [
        dict(),
        dict(film=True),
        dict(add=2),
        dict(add="own"),
        dict(film=True, activation=None),
    ]
    for shape, dtype, extra in itertools.product(SHAPES, DTYPES, extras):
        n, c = shape[:2]
        for x in layouts(random(*shape, dtype=dtype, offset=1)):
            small = DTYPES[(len(shape) + n) % len(DTYPES)]
            options = {"activation": extra.get("activation", "silu")}
            weight, bias = random(2, c, dtype=small, offset=3).unbind()
            if "film" in extra:
                film = random(n, 2 * c, dtype=small, offset=1)
                options["scale"], options["shift"] = film.chunk(2, dim=1)
            if "add" in extra:
                residual = extra["add"] == "residual" or x.dim() == 2
                options["add"] = torch.randn_like(x) if residual else random(n, c, dtype=small)
            leaves = [t for t in (x, weight, bias, *options.values()) if torch.is_tensor(t)]
            leaves = [leaf.requires_grad_() for leaf in leaves if leaf.is_leaf]
            for groups in {1, 2, c}:
                y = ops.group_norm_silu(x, groups, weight, bias, **options)
                torch.autograd.grad(y, leaves, torch.randn_like(x), allow_unused=True)
                with torch.no_grad():
                    ops.group_norm_silu(x, groups, None, None, **options)


def rms_norm_silu():
    for shape, dtype, film in itertools.product(SHAPES, DTYPES, (False, True)):
        n, c = shape[:2]
        for x in layouts(random(*shape, dtype=dtype, offset=1)):
            small = DTYPES[(len(shape) + n) % len(DTYPES)]
            options = {}
            if film:
                both = random(n, 2 * c, dtype=small, offset=1)
                options["scale"], options["shift"] = both.chunk(2, dim=1)
            for activation in ("silu", None):
                weight = random(c, dtype=small, offset=3)
                ops.rms_norm_silu(x, weight, activation=activation, **options)


def q_sample():
    tables = random(2, 11).abs()
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        t = torch.arange(shape[0]) * 5
        for x in layouts(random(*shape, dtype=dtype, offset=1)):
            ops.q_sample(x, t, *tables, noise=torch.randn_like(x))
            ops.q_sample(x, t, *tables, seed=3, first_sample=2**40)
            ops.q_sample(x, t.int(), *tables)


def posterior_step():
    betas = get_named_beta_schedule("cosine", 6)
    for method, learned in itertools.product(("ddpm", "ddim", "dpmsolver++"), (False, True)):
        if learned and method != "ddpm":
            continue
        process = GaussianDiffusion(betas, **({"var_type": "learned_range"} if learned else {}))
        table = StepTable.from_process(process, method=method, eta=1.0 if method == "ddim" else 0.0)
        for shape, dtype in itertools.product(SHAPES, DTYPES):
            n, c, *size = shape
            for x, guidance in itertools.product(
                layouts(random(*shape, dtype=dtype, offset=1)), (None, 2.5)
            ):
                batch = n if guidance is None else 2 * n
                output = random(batch, (1 + learned) * c, *size, dtype=dtype, offset=1)
                rest = dict(prev_x_start=torch.randn_like(x), guidance_scale=guidance)
                for step in (0, 3, len(table) - 1, torch.tensor(2)):
                    ops.posterior_step(x, output, table, step, seed=1, **rest)
                    ops.posterior_step(x, output, table, step, noise=torch.randn_like(x), **rest)
    for seed, shape in enumerate(4 * SHAPES):
        step_case = StepCase.of(seed, shape, dtypes=DTYPES)
        step_case.run()
        step_case.run(torch.tensor(step_case.i))


def attention():
    sizes = [
        (1, 1, 8, 1),
        (2, 2, 8, 7),
        (1, 3, 13, 33),
        (2, 1, 64, 65),
        (0, 2, 8, 4),
        (1, 1, 512, 9),
    ]
    for (n, heads, width, tokens), dtype in itertools.product(sizes, DTYPES):
        channel_major = random(n, 3 * heads * width, tokens, dtype=dtype, offset=1)
        token_major = random(n, tokens, 3 * heads * width, dtype=dtype, offset=1).transpose(1, 2)
        for qkv, order in itertools.product(
            (channel_major, token_major), ("heads_first", "qkv_first")
        ):
            out = ops.attention(qkv.requires_grad_(), heads, order=order)
            torch.autograd.grad(out, qkv, torch.randn_like(out))
            with torch.no_grad():
                ops.attention(qkv, heads, order=order)


def convolution():
    sizes = [(1, 3, 0, 5, 7, 6), (2, 32, 16, 4, 4, 33), (0, 4, 0, 3, 3, 4), (1, 16, 5, 2, 9, 16)]
    geometries = [(1, 1, (0, 0), False), (3, 1, (1, 1), True), (3, 2, (0, 1), False)]
    for (n, c, second, *size, k), dtype in itertools.product(sizes, DTYPES):
        x = random(n, c, *size, dtype=dtype, offset=1)
        rest = random(n, second, *size, dtype=dtype, offset=1) if second else None
        coefficients, add = random(n, 2, c + second), random(n, k)
        for kernel, stride, padding, upsample in geometries:
            weight = random(k, c + second, kernel, kernel)
            rows = {"second": rest, "coefficients": coefficients, "add": add}
            geometry = {"stride": stride, "padding": padding, "upsample": upsample}
            ways = possible(dtype, (kernel, kernel), stride)
            for products, doubled in itertools.product(ways, {None, 1 if upsample else None}):
                packed = pack(weight, dtype, products=products, doubled=doubled)
                y, _ = ops.convolution(x, packed, activation="silu", **rows, **geometry)
                ops.convolution(x, packed, random(k), residual=y, moments=True, **rows, **geometry)
            leaves = x.clone(), random(k, c, kernel, kernel), random(k)
            leaves = [leaf.requires_grad_() for leaf in leaves]
            y, _ = ops.convolution(*leaves, stride=stride, padding=padding)
            torch.autograd.grad(y, leaves, torch.randn_like(y))
    for size in ((5, 5), (4, 4), (3, 8)):  # read where they are, and not
        x, rest = (random(2, 32, *size, dtype=torch.bfloat16, offset=1) for _ in range(2))
        ops.convolution(x, random(33, 64, 1, 1), second=rest, moments=True)


def norm_coefficients():
    for n, c, second, groups in [(2, 12, 4, 4), (1, 1, 0, 1), (0, 4, 0, 2)]:
        film = random(n, 2 * (c + second)).chunk(2, dim=1)
        ops.norm_coefficients(
            random(n, 2, c), groups, random(c + second), random(c + second),
            second=random(n, 2, second) if second else None, scale=film[0], shift=film[1],
        )  # fmt: skip


OPERATIONS = [
    normal,
    group_norm_silu,
    rms_norm_silu,
    q_sample,
    posterior_step,
    attention,
    convolution,
    norm_coefficients,
]


def backend_of(operation):
    """The backend that a plan names for a small call, as ``fastdiff.explain`` says."""
    x = torch.zeros(1, 6, 2)
    table = StepTable.from_process(GaussianDiffusion(get_named_beta_schedule("cosine", 6)))
    arguments = {
        "group_norm_silu": (x, 2, None, None),
        "q_sample": (x, torch.zeros(1).long(), torch.ones(3), torch.ones(3)),
        "posterior_step": (x, x, table, 0),
        "attention": (x, 1),
        "rms_norm_silu": (x, torch.ones(6)),
        "convolution": (x[..., None], torch.zeros(4, 6, 1, 1)),
        "norm_coefficients": (x.mT, 2, torch.ones(6), torch.ones(6)),
    }
    return fastdiff.explain(operation, *arguments[operation]).backend


def overflow():
    x, y = torch.randn(33), torch.empty(32)
    shape = native_shape(1, 33, 1, channels_last=True)
    native.library().group_norm_silu_cpu(shape, x.data_ptr(), 0, 0, 0, 0, 0, y.data_ptr(), 0, 1)


def main():
    assert native.build_info()["sanitize"]
    if sys.argv[1] == "overflow":
        overflow()
        return
    if sys.argv[1] == "short":  # the odd ones, in fewer dtypes
        del SHAPES[4:-2], DTYPES[2:]
    listed = {operation.__name__ for operation in OPERATIONS} - {"normal"}
    native_ones = {name for name in ops.__all__ if "native" in dispatch.OPERATIONS[name].kernels}
    assert listed == native_ones, "list every operation here"
    fastdiff.set_backend("native")
    for name in native_ones:
        assert backend_of(name) == "native", name
    torch.manual_seed(0)
    for isa in native.library().supported_isas():
        native.library().set_isa(isa)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for operation in OPERATIONS:
                operation()
                print("ran", operation.__name__, isa, threads, flush=True)


if __name__ == "__main__":
    main()
