"""Predictor–corrector sampling (Song et al. 2021, arXiv:2011.13456, section 4.2)."""

from fastdiff.checks import is_finite
from fastdiff.errors import InputError
from fastdiff.methods.legs import ancestral
from fastdiff.methods.levels import Level, Source
from fastdiff.methods.registry import method
from fastdiff.methods.rows import Row


@method("predictor-corrector")
def predictor_corrector(
    source: Source, *, eta: float = 1.0, corrections: int = 1, snr: float = 0.16
) -> list[Row]:
    """An ancestral step to the next level, then Langevin steps that stay there.

    Args:
        source: the process's levels and what the network predicts.
        eta: the predictor's share of noise: 1 ancestral sampling, 0 the probability flow.
        corrections: Langevin steps at each level, a network call each: K + (K − 1)·corrections
            calls. There are none at the data.
        snr: r of algorithms 4 and 5, the signal-to-noise ratio of a Langevin step; the published
            code's 0.16.

    Raises:
        InputError: an ``eta`` that is no share, a negative number of corrections, an ``snr``
            outside 0 … ½.
    """
    if isinstance(corrections, bool) or not isinstance(corrections, int) or corrections < 0:
        raise InputError(f"corrections is {corrections!r}; expected a number of steps, 0 or more")
    if not (is_finite(snr) and 0 < snr <= 0.5):
        raise InputError(f"snr is {snr!r}; expected a number above 0, at most 0.5")
    rows: list[Row] = []
    for leg in ancestral(source.path, eta):
        rows += leg.rows()
        if leg.next.noise > 0:
            rows += [_langevin(leg.next, snr)] * corrections
    return rows


def _langevin(at: Level, snr: float) -> Row:
    """x' = x + ε·score + √(2ε)·z with score = (signal·x_0 − x) / noise².

    The published ε = 2·(r·‖z‖/‖score‖)² depends on x. Here both norms are those that are expected
    where the score is exact for one x_0, ‖z‖² = dim and ‖score‖² = dim / noise²: ε = 2·(r·noise)².
    That is algorithm 4's annealed step size; algorithm 5's factor α, which makes it the
    discretisation's own and tends to 1 with the number of steps, is left out, so that processes
    that differ in signal alone have the same steps. The noise's variance grows by 4r⁴ of itself.
    """
    step = 2 * (snr * at.noise) ** 2
    share = step / at.noise**2
    return Row(at, c=share * at.signal, d=1 - share, sigma=(2 * step) ** 0.5)
