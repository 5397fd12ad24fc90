"""rms_norm_silu: against the equations in float64 and beside PyTorch's own error."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdiff
from fastdiff.ops import native, rms_norm_silu
from kernel_tools import ISAS, examples, forced_isa
from norm_cases import WIDTHS, error, poison, threads, ulps
from rms_norm_cases import case, check, eager, equations, native_shape

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# --- Against the equations --------------------------------------------------------------------


@pytest.mark.seconds
@settings(deadline=None, max_examples=examples(150))
@given(
    n=st.integers(0, 3),
    c=st.integers(1, 75),
    spatial=st.lists(st.integers(0, 11), max_size=3),
    dtype=st.sampled_from(DTYPES),
    parameters=st.sampled_from([None, torch.float32, torch.float64]),
    film=st.sampled_from([None, "rows", "chunks"]),
    channels_last=st.booleans(),
    activation=st.sampled_from(["silu", None]),
    isa=st.sampled_from(ISAS),
)
def test_any_shape(n, c, spatial, dtype, parameters, film, channels_last, activation, isa):
    torch.manual_seed(0)
    tensors = case(
        n, c, spatial, dtype=dtype, channels_last=channels_last, film=film, parameters=parameters
    )
    with forced_isa(isa):
        result = check(tensors, activation=activation)
    assert result.stride() == torch.empty_like(tensors["x"]).stride()


@pytest.mark.sample(60)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("film", [None, "chunks"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(2, 64, 32, 32), (1, 192, 17, 13), (2, 1024, 5, 7), (1, 96, 4, 6, 5), (3, 128, 100)]
)
def test_the_shapes_of_models(isa, shape, dtype, film, channels_last):
    torch.manual_seed(0)
    n, c, *spatial = shape
    check(case(n, c, spatial, dtype=dtype, channels_last=channels_last, film=film))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(1, 3, 300, 301), (1, 5000, 9, 5), (1, 40_000, 40), (2, 7000)])
def test_few_channels_and_many(isa, shape, channels_last):
    """A plane of many tiles, and positions of which a tile holds no more than a few."""
    torch.manual_seed(0)
    n, c, *spatial = shape
    check(case(n, c, spatial, channels_last=channels_last, film="rows"))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("std", [1e4, 1e15, 1e-4, 1e-10])
def test_large_and_small_numbers(isa, std, dtype, channels_last):
    torch.manual_seed(0)
    check(case(2, 48, (7, 9), dtype=dtype, channels_last=channels_last, std=std, film="rows"))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("value", [1e4, 6e4])
def test_norms_beyond_float16(isa, value, channels_last):
    """‖x‖ is no float16 here, and neither is Σx²; x and the result are."""
    memory = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.full((1, 64, 3, 5), value).half().contiguous(memory_format=memory)
    result = rms_norm_silu(x, torch.ones(64))
    truth = equations(x, torch.ones(64))
    assert error(result, truth) <= ulps(1, torch.float16, truth)


@pytest.mark.parametrize("weight", [1e-20, 30.0, 1e3, 1e10])
def test_silu_far_from_zero(isa, weight):
    torch.manual_seed(0)
    tensors = case(2, 8, (6, 6))
    check({**tensors, "weight": torch.full((8,), weight)})


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_vectors(isa, dtype, channels_last):
    torch.manual_seed(0)
    tensors = case(2, 24, (5, 7), dtype=dtype, channels_last=channels_last, film="rows")
    tensors["x"][0, :, 2, 3] = 0
    tensors["x"][1] = 0
    result = check(tensors)
    expected = F.silu(tensors["shift"][0].double())  # what remains of 0·gain + shift
    assert error(result[0, :, 2, 3], expected) <= ulps(1, dtype, expected)
    tensors |= {"scale": None, "shift": None}
    assert (check(tensors)[1] == 0).all()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("eps", [1e-12, 1e-3, 10.0, 1])
def test_eps_is_the_least_norm(isa, eps, channels_last):
    torch.manual_seed(0)
    tensors = case(2, 16, (5, 5), channels_last=channels_last)
    tensors["x"] *= torch.logspace(-16, 1, 25).view(5, 5)  # norms on both sides of eps
    check(tensors, eps=eps)
    check(tensors, eps=eps, activation=None)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_at_its_position(isa, dtype, value, channels_last):
    torch.manual_seed(0)
    for c, spatial in [(3, (5, 5)), (40, (9, 4)), (17, (3, 1))]:
        tensors = case(2, c, spatial, dtype=dtype, channels_last=channels_last)
        clean = rms_norm_silu(**tensors)
        tensors["x"][1, c - 1, 2, 0] = value
        result = rms_norm_silu(**tensors)
        own = eager(**tensors)[1, :, 2, 0]  # NaN everywhere, or zero beside what was infinite
        assert torch.equal(result[1, :, 2, 0].isnan(), own.isnan()) and own[c - 1].isnan()
        result[1, :, 2, 0] = clean[1, :, 2, 0]
        assert torch.equal(result, clean)


@pytest.mark.parametrize("film", DTYPES + [torch.float64])
@pytest.mark.parametrize("parameters", DTYPES + [torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_dtypes(dtype, parameters, film):
    torch.manual_seed(0)
    tensors = case(2, 20, (7, 3), dtype=dtype, parameters=parameters, film="rows")
    tensors["scale"] = tensors["scale"].to(film)
    check(tensors)
    check({**tensors, "shift": tensors["shift"].to(film)})


def test_float64_is_the_reference_s():
    torch.manual_seed(0)
    tensors = case(2, 8, (3, 3), dtype=torch.float64, film="chunks")
    result = rms_norm_silu(**tensors)
    assert result.dtype == torch.float64
    assert error(result, equations(**tensors)) < 1e-12


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("film", [None, "rows", "chunks"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference(dtype, film, channels_last):
    torch.manual_seed(0)
    with fastdiff.backend("reference"):
        for spatial in [(), (7,), (5, 6), (2, 3, 4)]:
            tensors = case(2, 24, spatial, dtype=dtype, film=film, channels_last=channels_last)
            for activation in ("silu", None):
                result = check(tensors, activation=activation)
                assert result.stride() == tensors["x"].stride()


def test_every_shape_of_the_weight_is_the_same():
    torch.manual_seed(0)
    tensors = case(2, 12, (5, 4))
    expected = rms_norm_silu(**tensors)
    for shape in [(12,), (12, 1, 1), (1, 12), (12, 1), (3, 4)]:
        for weight in (tensors["weight"].reshape(shape), tensors["weight"].double().reshape(shape)):
            assert torch.equal(rms_norm_silu(tensors["x"], weight), expected), shape


# --- The same bits ----------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "c", "spatial"), [(1, 64, (64, 64)), (3, 7, (150, 151)), (5, 96, (9, 7)), (1, 300, (99,))]
)
def test_any_number_of_threads_gives_the_same_bits(isa, n, c, spatial, channels_last, dtype):
    torch.manual_seed(0)
    tensors = case(n, c, spatial, dtype=dtype, channels_last=channels_last, film="chunks")
    with threads(1):
        expected = rms_norm_silu(**tensors)
        assert torch.equal(rms_norm_silu(**tensors), expected)
    for count in (2, 3, 5):
        with threads(count):
            assert torch.equal(rms_norm_silu(**tensors), expected), count


# --- Memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("film", [None, "rows"])
def test_every_element_is_written(isa, monkeypatch, film, channels_last, dtype):
    poison(monkeypatch)
    torch.manual_seed(0)
    for c, spatial in [
        (10, (3, 3)),
        (2 * WIDTHS[isa] + 3, (5, 7)),
        (8, (1, 1)),
        (6, (31,)),
        (5, ()),
    ]:
        check(case(2, c, spatial, dtype=dtype, channels_last=channels_last, film=film))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("c", "positions"), [(5, 7), (16, 16), (33, 1), (24, 100), (9, 31)])
def test_neighbours_of_the_output_are_left_alone(isa, c, positions, channels_last, dtype):
    torch.manual_seed(0)
    n, guard = 2, 64
    x = torch.randn(n * c * positions).to(dtype)
    weight = torch.ones(c, dtype=dtype)
    buffer = torch.full((x.numel() + 2 * guard + 1,), 7.0, dtype=dtype)
    start = guard + 1  # misaligned for every vector
    native.library().rms_norm_silu_cpu(
        native_shape(n, c, positions, dtype=dtype, channels_last=channels_last),
        x.data_ptr(), weight.data_ptr(), 0, 0, buffer[start:].data_ptr(), 1,
    )  # fmt: skip
    end = start + x.numel()
    assert (buffer[:start] == 7).all() and (buffer[end:] == 7).all()
    view = (n, positions, c) if channels_last else (n, c, positions)
    image, result = x.view(view), buffer[start:end].view(view)
    if channels_last:
        image, result = image.transpose(1, 2), result.transpose(1, 2)
    truth = equations(image, weight)
    assert error(result, truth) <= ulps(2, dtype, truth)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 3])
def test_misaligned_storage(isa, offset, dtype, channels_last):
    torch.manual_seed(0)
    tensors = case(2, 24, (5, 7), dtype=dtype, channels_last=channels_last, film="rows")

    def moved(tensor):
        buffer = tensor.new_zeros(tensor.numel() + offset)
        return buffer[offset:].as_strided(tensor.shape, tensor.stride(), offset).copy_(tensor)

    expected = rms_norm_silu(**tensors)
    assert torch.equal(rms_norm_silu(**{k: moved(v) for k, v in tensors.items()}), expected)


def strange(x):
    """The values of x at strides that no kernel reads, and values of x repeated by stride 0."""
    wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
    wide[..., ::2] = x
    yield "every second", wide[..., ::2]
    order = tuple(reversed(range(x.dim())))
    yield "reversed dimensions", x.permute(order).contiguous().permute(order)
    yield "samples apart", torch.stack([x, x], 1)[:, 0]
    yield "half of the channels", torch.cat([x, x], 1)[:, x.shape[1] :]
    yield "expanded batch", x[:1].expand(x.shape)
    yield "expanded channels", x[:, :1].expand(x.shape)
    yield "a row repeated", x[..., :1].expand(x.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides_of_x(dtype):
    torch.manual_seed(0)
    tensors = case(2, 12, (5, 4), dtype=dtype, film="rows")
    for name, x in strange(tensors["x"]):
        copied = torch.empty_like(x).copy_(x)
        for _ in range(2):  # the second call finds what the first one remembered
            result = rms_norm_silu(**{**tensors, "x": x})
            assert torch.equal(result, rms_norm_silu(**{**tensors, "x": copied})), name
            assert result.stride() == copied.stride(), name
            assert error(result, equations(**{**tensors, "x": x})) < 0.05, name


def test_any_strides_of_the_small_tensors():
    torch.manual_seed(0)
    tensors = case(3, 12, (5, 4), film="rows")
    expected = rms_norm_silu(**tensors)
    moved = {
        "weight": torch.stack([tensors["weight"]] * 2, 2)[:, :, 0],
        "scale": tensors["scale"].t().contiguous().t(),
        "shift": torch.cat([tensors["shift"]] * 2, 1)[:, 12:].view(3, 12, 1, 1),
    }
    for name, value in moved.items():
        for _ in range(2):
            assert torch.equal(rms_norm_silu(**{**tensors, name: value}), expected), name
    one = {"scale": tensors["scale"][:1].expand(3, 12), "shift": torch.zeros(()).expand(3, 12)}
    copied = {name: value.contiguous() for name, value in one.items()}
    again = rms_norm_silu(**{**tensors, **copied})
    assert torch.equal(rms_norm_silu(**{**tensors, **one}), again)


def test_a_conversion_is_not_remembered_for_the_next_call():
    """The same shapes with other values: a remembered plan must not hold a copy's address."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        for _ in range(2):
            tensors = case(2, 12, (5, 4), parameters=dtype, film="chunks")
            check(tensors)
            check({**tensors, "x": tensors["x"].mT})


def test_inputs_are_left_alone():
    tensors = case(2, 32, (4, 4), film="chunks")
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    rms_norm_silu(**tensors)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)


def test_empty():
    for shape in [(0, 8, 4, 4), (2, 8, 0), (0, 8), (2, 0, 3)]:
        result = rms_norm_silu(torch.empty(shape), torch.ones(shape[1]))
        assert result.shape == shape
