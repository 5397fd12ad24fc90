"""Random words that depend on nothing but what they are for: the same on any machine and rank."""

import numpy as np
import numpy.typing as npt

# What a stream of words is for; beside each, what ``number`` counts.
ORDER, FLIPS = 0, 1  # epochs
TIMESTEPS, HIDDEN_LABELS = 2, 3  # training steps
NETWORK = 4  # and up, one for each rank: training steps
ITEMS = 1 << 20  # batches
READER = ITEMS + 1  # and up, one for each rank: epochs
SELF_CONDITION = 1 << 31  # beyond every rank's: training steps
OFFSET_NOISE = SELF_CONDITION + 1  # nothing: a seed
LOW_RES_LEVEL, LOW_RES_BLUR = SELF_CONDITION + 2, SELF_CONDITION + 3  # training steps
LOW_RES_NOISE = SELF_CONDITION + 4  # nothing: a seed
UPSAMPLING = SELF_CONDITION + 5  # sides of the small image: a seed


def words(seed: int, number: int, purpose: int, count: int) -> npt.NDArray[np.uint64]:
    """``count`` words of 64 bits: numpy's Philox, whose raw stream no version of numpy changes."""
    return np.random.Philox(np.random.SeedSequence((seed, number, purpose))).random_raw(count)


def uniform(seed: int, number: int, purpose: int, count: int) -> npt.NDArray[np.float64]:
    """``count`` numbers in [0, 1), multiples of 2⁻⁵³."""
    return (words(seed, number, purpose, count) >> np.uint64(11)) * np.float64(2.0**-53)
