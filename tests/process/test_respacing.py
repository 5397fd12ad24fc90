"""Strided subsequences: which timesteps are chosen, and the process over them."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fastdiff.errors import InputError
from fastdiff.process.gaussian import create_diffusion
from fastdiff.process.respacing import space_timesteps


@given(st.integers(1, 3000), st.data())
def test_a_count_spreads_evenly_and_takes_both_ends(num_timesteps, data):
    count = data.draw(st.integers(2, num_timesteps)) if num_timesteps > 1 else 1
    chosen = space_timesteps(num_timesteps, str(count))
    assert len(set(chosen)) == len(chosen) == count
    assert chosen[0] == 0 and chosen[-1] == num_timesteps - 1
    exact = np.linspace(0, num_timesteps - 1, count)
    assert np.abs(np.array(chosen) - exact).max() <= 0.5 + 1e-6
    assert chosen == space_timesteps(num_timesteps, count)
    assert chosen == space_timesteps(num_timesteps, [count])


@pytest.mark.seconds
@given(st.integers(1, 500), st.lists(st.integers(0, 60), min_size=1, max_size=8))
def test_sections_take_their_counts_from_their_own_part(num_timesteps, counts):
    size, extra = divmod(num_timesteps, len(counts))
    sizes = [size + (i < extra) for i in range(len(counts))]
    assume(sum(counts) > 0 and all(c <= s for c, s in zip(counts, sizes, strict=True)))
    chosen = np.array(space_timesteps(num_timesteps, counts))
    assert (np.diff(chosen) > 0).all()
    edges = np.append(0, np.cumsum(sizes))
    assert np.diff(np.searchsorted(chosen, edges)).tolist() == counts
    assert space_timesteps(num_timesteps, ",".join(map(str, counts))) == list(chosen)


@given(st.integers(1, 2000), st.integers(1, 2000))
def test_ddim_takes_an_integer_stride_or_refuses(num_timesteps, count):
    strides = [s for s in range(1, num_timesteps + 1) if len(range(0, num_timesteps, s)) == count]
    if strides:
        assert space_timesteps(num_timesteps, f"ddim{count}") == list(
            range(0, num_timesteps, strides[0])
        )
    else:
        with pytest.raises(InputError, match=f"exactly {count} of {num_timesteps} steps"):
            space_timesteps(num_timesteps, f"ddim{count}")


def test_positions_round_half_to_even():
    assert space_timesteps(6, "3") == [0, 2, 5]  # 0, 2.5, 5
    assert space_timesteps(8, "3") == [0, 4, 7]  # 0, 3.5, 7


def test_ddim_leaves_out_the_last_timestep():
    assert space_timesteps(1000, "ddim50") == list(range(0, 1000, 20))


def test_ddim_names_counts_that_work():
    with pytest.raises(InputError, match="nearest counts that work: 250, 334"):
        space_timesteps(1000, "ddim300")


def test_an_empty_string_takes_every_step():
    assert space_timesteps(7, "") == list(range(7))


def test_respaced_betas_keep_the_cumulative_signal_and_the_original_timesteps():
    base = create_diffusion(steps=400, noise_schedule="cosine", rescale_timesteps=True)
    strided = base.respace("10,15,20")
    assert strided.num_timesteps == 45 and strided.original_num_steps == 400
    kept = base.alphas_cumprod[strided.timestep_map]
    assert strided.alphas_cumprod == pytest.approx(kept, rel=1e-12)
    assert (strided.betas == 1 - kept / np.append(1.0, kept[:-1])).all()
    # The network is given timesteps of the process it was trained with, on the 0…1000 scale.
    assert strided.model_timesteps.dtype == np.float32
    assert strided.model_timesteps == pytest.approx(strided.timestep_map * 2.5, rel=1e-6)
    unscaled = create_diffusion(steps=400, timestep_respacing="10,15,20")
    assert (unscaled.model_timesteps == strided.timestep_map).all()


def test_respacing_twice_still_names_the_original_timesteps():
    base = create_diffusion(steps=1000)
    once = base.respace("100")
    twice = once.respace("10")
    assert (twice.timestep_map == once.timestep_map[space_timesteps(100, "10")]).all()
    assert twice.original_num_steps == 1000
    assert twice.alphas_cumprod == pytest.approx(base.alphas_cumprod[twice.timestep_map], rel=1e-12)


@pytest.mark.parametrize("var_type", ["fixed_small", "fixed_large", "learned_range"])
def test_a_single_step_has_finite_tables(var_type):
    one = create_diffusion(steps=1000, var_type=var_type, timestep_respacing="1")
    assert one.num_timesteps == 1 and list(one.timestep_map) == [0]
    for table in one._tables.tables.values():
        assert np.isfinite(table).all()
    assert one.posterior_log_variance_clipped == pytest.approx(np.log(one.betas))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ("11", "cannot choose 11 steps from section 1 of 1, which has 10"),
        ([3, 8], "cannot choose 8 steps from section 2 of 2, which has 5"),
        ("ten", "cannot read the respacing 'ten'"),
        ("ddimx", "cannot read the respacing 'ddimx'"),
        ("5,", "cannot read the respacing '5,'"),
        ("-3", "cannot read the respacing '-3'"),
        ([], "choose no timesteps"),
        ("0", "choose no timesteps"),
        ([-1], "must be at least 0, got -1"),
        (2.5, "must be an integer, got 2.5"),
        ([2.5], "must be an integer, got 2.5"),
        ("ddim0", "exactly 0 of 10"),
    ],
)
def test_bad_sections_get_one_line(sections, message):
    with pytest.raises(InputError, match=message) as caught:
        space_timesteps(10, sections)
    assert "\n" not in str(caught.value)
