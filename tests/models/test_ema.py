"""Averages of weights: closed form, several rates, precision, saving, and swapping in and out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastdiff.errors import InputError
from fastdiff.models.ema import EMA, initial_share, rate_name
from fastdiff.models.unet import UNet

RATES = (0.5, 0.99, 0.9999)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.SiLU(), nn.Linear(5, 2))


def randomize(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(first, second) -> None:
    assert list(first) == list(second)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@settings(max_examples=25, deadline=None)
@given(
    rates=st.lists(st.floats(0.01, 0.99999), min_size=1, max_size=4, unique=True),
    updates=st.integers(0, 12),
)
def test_averages_are_the_closed_form(rates, updates):
    # shadow_n = rate^n · p_0 + Σ_i (1 − rate) · rate^(n − i) · p_i
    model = network()
    history = [snapshot(model)]
    ema = EMA(model, rates)
    for step in range(updates):
        randomize(model, step)
        history.append(snapshot(model))
        ema.update()
    for rate in rates:
        assert initial_share(rate, updates, warmup=False) == pytest.approx(rate**updates)
        for name, average in ema.state_dict(rate).items():
            values = torch.stack([weights[name].double() for weights in history])
            i = torch.arange(updates + 1, dtype=torch.float64)
            factors = rate ** (updates - i) * torch.where(i == 0, 1.0, 1 - rate)
            expected = torch.tensordot(factors, values, dims=1)
            torch.testing.assert_close(average.double(), expected, rtol=2e-5, atol=2e-6)


def warm(rate: float, step: int) -> float:
    return min(rate, (1 + step) / (10 + step))


@settings(max_examples=25, deadline=None)
@given(
    rates=st.lists(st.floats(0.01, 0.99999), min_size=1, max_size=4, unique=True),
    updates=st.integers(0, 30),
)
def test_the_memory_grows_up_to_the_rate(rates, updates):
    model = network()
    ema = EMA(model, rates, warmup=True)
    expected = {rate: {name: w.double() for name, w in snapshot(model).items()} for rate in rates}
    shares = dict.fromkeys(rates, 1.0)
    for step in range(updates):
        randomize(model, step)
        ema.update()
        for rate in rates:
            r = warm(rate, step)
            shares[rate] *= r
            for name, weights in snapshot(model).items():
                expected[rate][name] = r * expected[rate][name] + (1 - r) * weights.double()
    assert ema.updates == updates
    for rate in rates:
        assert initial_share(rate, updates, warmup=True) == pytest.approx(shares[rate], rel=1e-9)
        for name, average in ema.state_dict(rate).items():
            torch.testing.assert_close(average.double(), expected[rate][name], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("warmup", "least", "most"), [(True, 0.0, 1e-12), (False, 0.96, 0.962)])
def test_after_400_steps_an_average_has_forgotten_its_start(warmup, least, most):
    """What a short run's default samples come from: with a constant rate, untrained weights."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    ema = EMA(model, (0.9999,), warmup=warmup)
    nn.init.zeros_(model.weight)  # the whole run: the weights have left where they began
    for _ in range(400):
        ema.update()
    share = float(ema.state_dict(0.9999)["weight"])
    assert least <= share <= most
    assert share == pytest.approx(initial_share(0.9999, 400, warmup=warmup), rel=1e-3, abs=1e-15)


def test_rates_are_named_by_their_shortest_decimal_form():
    ema = EMA(network(), RATES)
    assert ema.rates == ["0.5", "0.99", "0.9999"]
    assert ema.highest_rate == "0.9999"
    assert EMA(network(), (0.9999, 0.99)).highest_rate == "0.9999"
    assert rate_name(0.9999) == rate_name("0.99990") == "0.9999"
    assert ema.state_dict(0.99)["0.weight"] is ema.state_dict("0.990")["0.weight"]


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.5, 1.5, float("nan"), "fast"])
def test_rates_out_of_range_are_refused(rate):
    with pytest.raises(InputError, match=r"EMA: rate .*"):
        EMA(network(), (rate,))


def test_rates_given_twice_or_unknown_are_refused():
    with pytest.raises(InputError, match="average 0.99 was given twice"):
        EMA(network(), (0.99, 0.990))
    with pytest.raises(InputError, match="no average 0.9; there are 0.99"):
        EMA(network(), (0.99,)).state_dict(0.9)


def test_no_rates_at_all_average_nothing():
    model = network()
    ema = EMA(model, ())
    ema.update()
    assert ema.rates == []
    with pytest.raises(InputError, match="made with no rates"), ema.swapped():
        pass


def test_averages_of_bfloat16_parameters_are_float32():
    model = nn.Linear(4, 4, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema = EMA(model, (0.9999,))
    with torch.no_grad():
        model.weight.fill_(2.0)
    for _ in range(100):
        ema.update()
    average = ema.state_dict(0.9999)["weight"]
    assert average.dtype == torch.float32
    # In bfloat16 no step of 1e-4 would move it from 1.
    torch.testing.assert_close(average, torch.full((4, 4), 2 - 0.9999**100), rtol=0, atol=1e-5)


def test_state_dict_round_trip_goes_on_bit_for_bit():
    first, second = network(), network()
    one = EMA(first, RATES)
    randomize(first, 1)
    one.update()
    two = EMA(second, RATES)
    for rate in one.rates:
        saved = {name: average.clone() for name, average in one.state_dict(rate).items()}
        two.load_state_dict(rate, saved)
    two.updates = one.updates
    for model, ema in ((first, one), (second, two)):
        randomize(model, 2)
        ema.update()
    for rate in one.rates:
        assert_same(one.state_dict(rate), two.state_dict(rate))


def test_a_state_of_another_model_is_refused_and_changes_nothing():
    ema = EMA(network(), (0.9,))
    before = {name: average.clone() for name, average in ema.state_dict(0.9).items()}
    other = EMA(nn.Linear(2, 2), (0.9,)).state_dict(0.9)
    with pytest.raises(InputError, match="of another model; .* names differ, such as 0.bias"):
        ema.load_state_dict(0.9, other)
    wrong = {name: torch.ones_like(average) for name, average in before.items()}
    wrong["2.bias"] = torch.zeros(7)
    with pytest.raises(InputError, match=r"2.bias has shape \(7,\) .* the model has \(2,\)"):
        ema.load_state_dict(0.9, wrong)
    assert_same(ema.state_dict(0.9), before)


def test_swapped_shows_the_average_and_then_what_was_there():
    model = network()
    ema = EMA(model, RATES)
    start = snapshot(model)
    randomize(model, 1)
    ema.update()
    trained = snapshot(model)
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    with ema.swapped("0.5"):
        assert_same(snapshot(model), ema.state_dict(0.5))
        assert pointers == [parameter.data_ptr() for parameter in model.parameters()]
    assert_same(snapshot(model), trained)
    with ema.swapped():
        torch.testing.assert_close(
            snapshot(model)["0.weight"], start["0.weight"], atol=1e-3, rtol=0
        )
    assert_same(snapshot(model), trained)


def test_swapped_restores_when_the_block_fails():
    model = network()
    ema = EMA(model, (0.9,))
    randomize(model, 1)
    trained = snapshot(model)
    with pytest.raises(KeyboardInterrupt), ema.swapped(0.9):
        randomize(model, 2)  # even where the block wrote to the weights
        raise KeyboardInterrupt
    assert_same(snapshot(model), trained)


def test_swapped_restores_odd_layouts_and_dtypes_bit_for_bit():
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last).bfloat16()
    ema = EMA(model, (0.9,))
    randomize(model, 1)
    ema.update()
    trained = snapshot(model)
    with ema.swapped():
        assert torch.equal(model.weight, ema.state_dict(0.9)["weight"].bfloat16())
    assert_same(snapshot(model), trained)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)


def test_copy_to_writes_into_another_model():
    model, target = network(), network(seed=5)
    ema = EMA(model, (0.5,))
    randomize(model, 1)
    ema.update()
    pointers = [parameter.data_ptr() for parameter in target.parameters()]
    ema.copy_to(target, 0.5)
    assert_same(snapshot(target), ema.state_dict(0.5))
    assert pointers == [parameter.data_ptr() for parameter in target.parameters()]
    assert all(parameter.requires_grad for parameter in target.parameters())


def test_copy_to_a_model_that_differs_is_refused_and_changes_nothing():
    ema = EMA(network(), (0.5,))
    target = nn.Sequential(nn.Linear(3, 5), nn.SiLU(), nn.Linear(5, 3))
    before = snapshot(target)
    with pytest.raises(InputError, match="a parameter 2.weight that was not averaged"):
        ema.copy_to(target, 0.5)
    assert_same(snapshot(target), before)


@pytest.mark.parametrize("assign", [False, True])
def test_weights_loaded_later_are_seen(assign):
    # load_state_dict writes into the parameters, or with assign=True puts others in their place.
    model = network()
    ema = EMA(model, (0.5,))
    start = snapshot(model)
    loaded = network(seed=7).state_dict()
    model.load_state_dict(loaded, assign=assign)
    ema.update()
    for name, average in ema.state_dict(0.5).items():
        torch.testing.assert_close(average, (start[name] + loaded[name]) / 2)
    trained = snapshot(model)
    with ema.swapped():
        assert_same(snapshot(model), ema.state_dict(0.5))
    assert_same(snapshot(model), trained)


def test_averages_do_not_share_memory_with_the_model_or_each_other():
    model = network()
    ema = EMA(model, (0.5, 0.9))
    start = snapshot(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same(ema.state_dict(0.5), start)
    ema.update()
    assert not torch.equal(ema.state_dict(0.5)["0.weight"], ema.state_dict(0.9)["0.weight"])


def test_updates_keep_no_graph():
    model = network()
    ema = EMA(model, (0.5,))
    ema.update()
    assert not any(average.requires_grad for average in ema.state_dict(0.5).values())


def test_every_parameter_of_the_unet_is_averaged():
    torch.manual_seed(0)
    model = UNet(1, 8, 1, 1, (2,), channel_mult=(1, 2), num_classes=3)
    ema = EMA(model, (0.5,))
    randomize(model, 1)
    ema.update()
    assert set(ema.state_dict(0.5)) == set(model.state_dict())
    model.load_state_dict(ema.state_dict(0.5), strict=True)
