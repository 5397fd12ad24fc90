"""group_norm_silu, forward: against the equations in float64 and beside PyTorch's own error."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.ops import group_norm_silu, native
from kernel_tools import EMULATED, ISAS, examples, forced_isa
from norm_cases import (
    WIDTHS,
    case,
    eager,
    equations,
    error,
    kernels_at_any_size,  # noqa: F401
    native_shape,
    poison,
    run,
    threads,
    ulps,
)  # fmt: skip

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(tensors, num_groups, rounds=2.0, **options):
    """At most twice PyTorch's error, and ``rounds`` roundings of the largest number on the way."""
    x = tensors["x"]
    result = run(group_norm_silu, tensors, num_groups, **options)
    assert result.dtype == x.dtype and result.shape == x.shape
    truth = run(equations, tensors, num_groups, **options)
    before = run(equations, tensors, num_groups, **{**options, "activation": None})
    if x.numel() == 0:
        return result
    own = run(eager, tensors, num_groups, **options)
    bound = 2 * error(own, truth) + ulps(rounds, x.dtype, before)
    assert error(result, truth) <= bound, (error(result, truth), error(own, truth))
    return result


# --- Against the equations --------------------------------------------------------------------


@pytest.mark.seconds
@pytest.mark.any_backend
@settings(deadline=None, max_examples=examples(150))
@given(
    n=st.integers(0, 3),
    groups=st.integers(1, 5),
    width=st.integers(1, 37),
    spatial=st.lists(st.integers(1, 9), max_size=3),
    dtype=st.sampled_from(DTYPES),
    parameters=st.sampled_from([None, "own", torch.float32]),
    film=st.sampled_from([None, "plain", "chunks"]),
    add=st.sampled_from([None, "embedding", "strided", "residual"]),
    channels_last=st.booleans(),
    activation=st.sampled_from(["silu", None]),
    isa=st.sampled_from(ISAS),
)
def test_any_shape(
    n, groups, width, spatial, dtype, parameters, film, add, channels_last, activation, isa
):
    torch.manual_seed(0)
    if width * torch.Size(spatial).numel() == 1:
        width = 2  # groups of one element have a test of their own
    tensors = case(
        n, groups * width, spatial, dtype=dtype, channels_last=channels_last, film=film, add=add,
        parameters=dtype if parameters == "own" else parameters,
    )  # fmt: skip
    with forced_isa(isa):
        # Groups of few elements divide x's roundings by their small deviation.
        result = check(tensors, groups, rounds=16, activation=activation)
    assert result.stride() == torch.empty_like(tensors["x"]).stride()


@pytest.mark.sample(16)
@pytest.mark.any_backend
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("film", [None, "chunks"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2 if EMULATED else 8, 128, 32, 32), 32),
        ((1, 192, 17, 13), 32),
        ((2, 1000, 5, 5), 8),
        ((3, 96, 4, 6, 5), 3),
    ],
)
def test_the_shapes_of_models(shape, groups, dtype, film, channels_last):
    torch.manual_seed(0)
    n, c, *spatial = shape
    check(case(n, c, spatial, dtype=dtype, channels_last=channels_last, film=film), groups)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(1, 3, 1000, 1000), (1, 48, 257, 255)])
def test_a_group_of_three_million(shape, channels_last):
    torch.manual_seed(0)
    n, c, *spatial = shape
    check(case(n, c, spatial, channels_last=channels_last, mean=3.0), 1)


@pytest.mark.any_backend
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("add", [None, "embedding", "residual"])
@pytest.mark.parametrize("ratio", [1e3, 1e4])
def test_mean_far_above_the_deviation(isa, ratio, add, channels_last):
    torch.manual_seed(0)
    tensors = case(2, 32, (33, 31), channels_last=channels_last, add=add, mean=ratio)
    check(tensors, 4)
    check({**tensors, "x": tensors["x"] * 1e-2}, 4)


@pytest.mark.sample(36)
@pytest.mark.any_backend
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels", [2, 3, 8, 64])
@pytest.mark.parametrize("outlier", [1e2, 1e4])
@pytest.mark.parametrize("where", [0, 1, -1])
def test_an_outlier_at_either_end(isa, where, outlier, channels, channels_last):
    """A shifted sum whose shift is the outlier loses every other element."""
    torch.manual_seed(0)
    tensors = case(1, channels, (128, 64), channels_last=channels_last)
    tensors["x"].flatten(2)[..., where] = outlier
    check(tensors, 1, activation=None)


@pytest.mark.any_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 32), (1, 32, 1, 1), (3, 32, 1)])
def test_groups_of_one_element(shape, dtype):
    """F.group_norm refuses one sample of these, as if it were training a batch norm."""
    torch.manual_seed(0)
    weight, bias = torch.randn(32), torch.randn(32)
    result = group_norm_silu(torch.randn(shape).to(dtype), 32, weight, bias)
    truth = F.silu(bias.double())
    bound = 2 * error(F.silu(bias), truth) + ulps(2, dtype, bias)  # check's, of any shape
    assert error(result, truth.view(1, 32, *[1] * (len(shape) - 2)).expand(shape)) <= bound


@pytest.mark.any_backend
def test_statistics_are_float32_in_half_precision():
    """A bfloat16 sum over 65,536 equal values stops growing at 256; the mean would be far off."""
    x = torch.full((1, 2, 256, 256), 1.0, dtype=torch.bfloat16)
    x[:, 1] = 3.0
    for layout in (torch.contiguous_format, torch.channels_last):
        result = group_norm_silu(x.contiguous(memory_format=layout), 1, None, None, activation=None)
        assert torch.equal(result[0, :, 0, 0], torch.tensor([-1.0, 1.0], dtype=torch.bfloat16))


@pytest.mark.any_backend
@pytest.mark.parametrize("film", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("parameters", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_dtypes(dtype, parameters, film):
    torch.manual_seed(0)
    tensors = case(2, 20, (7, 3), dtype=dtype, parameters=parameters, film="plain", add="embedding")
    tensors["scale"], tensors["add"] = tensors["scale"].to(film), tensors["add"].to(film)
    check(tensors, 5, rounds=8)


def test_float64_is_the_reference_s():
    torch.manual_seed(0)
    tensors = case(2, 8, (3, 3), dtype=torch.float64, film="plain", add="embedding")
    result = run(group_norm_silu, tensors, 2)
    assert result.dtype == torch.float64
    assert error(result, run(equations, tensors, 2)) < 1e-12


@pytest.mark.any_backend
@pytest.mark.parametrize("eps", [1e-6, 1e-3, 10.0])
def test_eps(eps):
    torch.manual_seed(0)
    check(case(2, 8, (5, 5), std=1e-2), 2, eps=eps)


# --- The same bits ----------------------------------------------------------------------------

SAME_BITS = [
    (n, c, spatial, channels_last)
    for n, c, spatial in [
        (1, 32, (64, 64)),
        (3, 6, (150, 151)),
        (1, 2, (300, 301)),
        (5, 96, (9, 7)),
    ]
    for channels_last in (False, True)
]


@pytest.mark.parametrize(("n", "c", "spatial", "channels_last"), SAME_BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(n, c, spatial, channels_last, dtype):
    torch.manual_seed(0)
    options = dict(dtype=dtype, channels_last=channels_last, film="chunks", add="embedding")
    tensors = case(n, c, spatial, **options)
    with threads(1):
        expected = run(group_norm_silu, tensors, 2)
        assert torch.equal(run(group_norm_silu, tensors, 2), expected)
    for count in (2, 3, 5):
        with threads(count):
            for _ in range(2):
                assert torch.equal(run(group_norm_silu, tensors, 2), expected), count


# --- Memory -----------------------------------------------------------------------------------


@pytest.mark.any_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("add", [None, "embedding", "residual"])
def test_every_element_is_written(isa, monkeypatch, add, channels_last, dtype):
    torch.manual_seed(0)
    poison(monkeypatch)
    for c, spatial in [(10, (3, 3)), (2 * WIDTHS[isa] + 3, (5, 7)), (8, (1, 1)), (6, (31,))]:
        options = dict(dtype=dtype, channels_last=channels_last, film="plain", add=add)
        check(case(2, c, spatial, **options), c // 2 if c % 2 == 0 else 1, rounds=16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("c", "positions"), [(5, 7), (16, 16), (33, 1), (24, 100)])
def test_neighbours_of_the_output_are_left_alone(isa, c, positions, channels_last, dtype):
    torch.manual_seed(0)
    n, guard = 2, 64
    x = torch.randn(n * c * positions).to(dtype)
    buffer = torch.full((x.numel() + 2 * guard + 1,), 7.0, dtype=dtype)
    statistics = torch.full((2 * n + 2 * guard,), 7.0)
    shape = native_shape(n, c, positions, dtype=dtype, channels_last=channels_last)
    start = guard + 1  # misaligned for every vector
    native.library().group_norm_silu_cpu(
        shape, x.data_ptr(), 0, 0, 0, 0, 0, buffer[start:].data_ptr(),
        statistics[guard:].data_ptr(), 1,
    )  # fmt: skip
    end = start + x.numel()
    assert (buffer[:start] == 7).all() and (buffer[end:] == 7).all()
    assert (statistics[:guard] == 7).all() and (statistics[-guard:] == 7).all()
    view = (n, positions, c) if channels_last else (n, c, positions)
    image, result = x.view(view), buffer[start:end].view(view)
    if channels_last:
        image, result = image.transpose(1, 2), result.transpose(1, 2)
    truth = equations(image, 1, None, None)
    assert error(result, truth) <= ulps(2, dtype, truth) + 1e-6
    mean = image.double().flatten(1).mean(1)
    assert error(statistics[guard : guard + n], mean) < 1e-6


@pytest.mark.any_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 3])
def test_misaligned_storage(isa, offset, dtype):
    torch.manual_seed(0)
    tensors = case(2, 24, (5, 7), dtype=dtype, parameters=dtype, film="plain", add="residual")

    def moved(tensor):
        buffer = torch.zeros(tensor.numel() + offset, dtype=tensor.dtype)
        return buffer[offset:].view(tensor.shape).copy_(tensor)

    expected = run(group_norm_silu, tensors, 3)
    assert torch.equal(run(group_norm_silu, {k: moved(v) for k, v in tensors.items()}, 3), expected)


def strange(x):
    """The values of x at strides that no kernel reads, and values of x repeated by stride 0."""
    wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
    wide[..., ::2] = x
    yield "every second", wide[..., ::2]
    yield (
        "reversed dimensions",
        x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim()))),
    )
    yield "samples apart", torch.stack([x, x], 1)[:, 0]
    yield "expanded batch", x[:1].expand(x.shape)
    yield "expanded channels", x[:, :1].expand(x.shape)
    yield "a row repeated", x[..., :1].expand(x.shape)


@pytest.mark.any_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides_of_x_and_of_a_residual(dtype):
    torch.manual_seed(0)
    tensors = case(2, 12, (5, 4), dtype=dtype, add="residual")
    for name, x in strange(tensors["x"]):
        # Rounded alike, so equal to the bit.
        for add in (tensors["add"], tensors["add"].contiguous(memory_format=torch.channels_last)):
            given = {**tensors, "x": x, "add": add}
            plain = {**tensors, "x": x.contiguous(), "add": add.contiguous()}
            assert torch.equal(run(group_norm_silu, given, 3), run(group_norm_silu, plain, 3)), name
    for name, add in strange(tensors["add"]):
        plain = run(group_norm_silu, {**tensors, "add": add.contiguous()}, 3)
        assert torch.equal(run(group_norm_silu, {**tensors, "add": add}, 3), plain), name


@pytest.mark.any_backend
def test_any_strides_of_the_small_tensors():
    torch.manual_seed(0)
    tensors = case(3, 12, (5, 4), film="plain", add="embedding")
    expected = run(group_norm_silu, tensors, 3)
    moved = {
        "weight": torch.stack([tensors["weight"]] * 2, 1)[:, 0],
        "bias": tensors["bias"].repeat_interleave(3)[::3],
        "scale": tensors["scale"].t().contiguous().t(),
        "shift": torch.cat([tensors["shift"]] * 2, 1)[:, 12:],
        "add": torch.stack([tensors["add"]] * 2, 0)[1],
    }
    assert torch.equal(run(group_norm_silu, {**tensors, **moved}, 3), expected)
    one = {"scale": tensors["scale"][:1].expand(3, 12), "shift": torch.zeros(()).expand(3, 12)}
    copied = {name: value.contiguous() for name, value in one.items()}
    again = run(group_norm_silu, {**tensors, **copied}, 3)
    assert torch.equal(run(group_norm_silu, {**tensors, **one}, 3), again)


@pytest.mark.any_backend
def test_inputs_are_left_alone():
    tensors = case(2, 32, (4, 4), film="chunks", add="residual")
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    run(group_norm_silu, tensors, 8)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)


@pytest.mark.any_backend
def test_empty():
    for shape in [(0, 8, 4, 4), (2, 8, 0), (0, 8)]:
        result = group_norm_silu(torch.empty(shape), 2, torch.ones(8), torch.ones(8))
        assert result.shape == shape


@pytest.mark.any_backend
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_group(isa, dtype, value, channels_last):
    torch.manual_seed(0)
    for width, spatial in [(3, (5, 5)), (1, (40, 40)), (17, (3, 1))]:
        tensors = case(2, 4 * width, spatial, dtype=dtype, channels_last=channels_last)
        clean = run(group_norm_silu, tensors, 4)
        for where in (0, -1):
            x = tensors["x"].clone()

            x[1, 2 * width + (width - 1 if where else 0)].view(-1)[where] = value
            result = run(group_norm_silu, {**tensors, "x": x}, 4)
            assert result[1, 2 * width : 3 * width].isnan().all()  # as F.group_norm has it
            result[1, 2 * width : 3 * width] = clean[1, 2 * width : 3 * width]
            assert torch.equal(result, clean)


@pytest.mark.any_backend
def test_coefficients_that_are_not_finite_stay_in_their_channel(isa):
    torch.manual_seed(0)
    tensors = case(2, 8, (5, 3), film="plain")
    clean = run(group_norm_silu, tensors, 2)
    for name, value in [("scale", float("nan")), ("shift", float("inf")), ("weight", float("nan"))]:
        changed = tensors[name].clone()
        changed[..., 3] = value
        result = run(group_norm_silu, {**tensors, name: changed}, 2)
        assert not result[:, 3].isfinite().any()
        result[:, 3] = clean[:, 3]
        assert torch.equal(result, clean), name


@pytest.mark.any_backend
def test_large_and_small_numbers(isa):
    """SiLU far from zero on both sides, and variances that only eps holds up."""
    torch.manual_seed(0)
    for weight in (1e-20, 30.0, 1e3, 1e10):
        tensors = case(2, 8, (6, 6))
        tensors["weight"] = torch.full((8,), weight)
        check(tensors, 2)
    for std in (1e-30, 1e-12, 1e12):
        check(case(2, 8, (6, 6), std=std), 2)
