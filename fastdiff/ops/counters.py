"""Where a call's noise stands in the counter-based generator, and whose each of its steps is.

Each number is an int, or an int64 tensor of one element on the device, which is read where the
noise is drawn: a captured graph then draws anew at every replay.
"""

import operator
from typing import NamedTuple, SupportsIndex

import torch
from torch import Tensor

from fastdiff.errors import InputError

Counter = int | Tensor

# The counter's steps, never shared: x_T, then the sampling steps, then q_sample's: the training
# steps, and the rows of a sampler after which it noises what an inpainted image knows.
X_T_STEP = 0
TRAINING_STEP_BASE = 2**31
FIRST_KNOWN_STEP = 2**30  # of q_sample's


def sampling_step(index: int) -> int:
    """The counter's step for sampling step ``index`` = 0, 1, … (0 is the noisiest)."""
    return 1 + check_integer("sampling step", index, TRAINING_STEP_BASE - 1)


def training_step(index: int) -> int:
    """The counter's step for training step ``index`` = 0, 1, …"""
    return TRAINING_STEP_BASE + check_integer("training step", index, FIRST_KNOWN_STEP)


def known_step(index: int) -> int:
    """The counter's step for the noise of an inpainted image's known region after row ``index``."""
    limit = 2**32 - TRAINING_STEP_BASE - FIRST_KNOWN_STEP
    return TRAINING_STEP_BASE + FIRST_KNOWN_STEP + check_integer("known step", index, limit)


class Counters(NamedTuple):
    """What a call draws its noise from; without a seed it draws none.

    ``step`` is the number that the operation counts by: the generator's, a sampler's row, a
    training step. Sample i of the batch is sample ``first_sample + i`` of the seed.
    """

    step: Counter = X_T_STEP
    seed: Counter | None = None
    first_sample: Counter = 0

    def flat(self) -> tuple[list[int], Tensor | None, Tensor | None, Tensor | None]:
        """As operators take it (``SCHEMA``): the numbers, which are signed, and the tensors."""
        given = self[:1] if self.seed is None else self
        numbers = [0 if isinstance(v, Tensor) else signed(v) for v in given]  # type: ignore[arg-type]
        step, seed, first = (v if isinstance(v, Tensor) else None for v in self)
        return numbers, step, seed, first

    @classmethod
    def joined(
        cls, numbers: list[int], step: Tensor | None, seed: Tensor | None, first: Tensor | None
    ) -> "Counters":
        """The inverse of ``flat``."""
        pairs = zip(numbers, (step, seed, first), strict=False)
        return cls(*(number if tensor is None else tensor for number, tensor in pairs))


SCHEMA = "int[] numbers, Tensor? step, Tensor? seed, Tensor? first_sample"  # of Counters.flat


def signed(value: int, bits: int = 64) -> int:
    """The signed integer with the bits of an unsigned one: operators' integers are signed."""
    return value - 2**bits if value >= 2 ** (bits - 1) else value


def low_bits(counter: Counter, bits: int) -> int:
    """A counter's low bits as an unsigned number; a tensor is read for it."""
    return int(counter) & ((1 << bits) - 1)


def value_or_address(counter: Counter) -> tuple[int, int]:
    """A number and no address, or a tensor's address: its value is read on the device."""
    return (0, counter.data_ptr()) if isinstance(counter, Tensor) else (counter, 0)


def arguments(backend: str, counter: Counter | None, bits: int = 64, base: int = 0) -> tuple:
    """What compiled kernels take for ``base`` + a counter (None is 0): the CPU's its low bits,
    CUDA's these and the address of a tensor whose value they add."""
    counter = 0 if counter is None else counter
    if backend == "native":
        return ((base + int(counter)) & ((1 << bits) - 1),)
    number, address = value_or_address(counter)
    return low_bits(base + number, bits), address


def noise_arguments(
    backend: str, step: Counter, seed: Counter | None, first: Counter, base: int
) -> tuple:
    """What compiled kernels take for seed, ``base`` + step and first sample."""
    of_step = arguments(backend, step, 32, base)
    return *arguments(backend, seed), *of_step, *arguments(backend, first)


# --- Checks -----------------------------------------------------------------------------------


def check_integer(name: str, value: SupportsIndex, limit: int) -> int:
    """``value`` as an int if 0 ≤ value < limit."""
    try:
        number = operator.index(value)
    except TypeError:
        raise InputError(f"{name} is {value!r}: expected an integer") from None
    if not 0 <= number < limit:
        raise InputError(f"{name} is {number}: expected 0 <= {name} < {limit}")
    return number


def check_counter(name: str, value: Counter, limit: int, x: Tensor) -> Counter:
    """``value`` if it is a counter: 0 ≤ value < limit, or an int64 element on x's device."""
    if type(value) is int and 0 <= value < limit:
        return value
    if not isinstance(value, Tensor):
        return check_integer(name, value, limit)
    if value.dtype != torch.int64 or value.numel() != 1 or value.device != x.device:
        raise InputError(
            f"{name} is a {value.dtype} tensor of {value.numel()} elements on {value.device}: "
            f"expected an integer, or an int64 tensor of one element on {x.device}"
        )
    return value


def check_seed(value: Counter | None, x: Tensor) -> Counter | None:
    """``value`` if it is a counter for noise that is x's, or None."""
    return None if value is None else check_counter("seed", value, 2**64, x)


def check_first_sample(value: Counter, x: Tensor) -> Counter:
    """``value`` if it is a counter from which x's samples have numbers below 2⁶⁴, or a tensor."""
    if type(value) is int and 0 <= value < 2**63:  # spares a look at x: its samples are fewer
        return value
    samples = x.shape[:1].numel()
    return check_counter("first_sample", value, 2**64 + min(1 - samples, 0), x)


def check_counters(
    step: Counter, seed: Counter, first_sample: Counter, steps: int, x: Tensor
) -> tuple[Counter, Counter, Counter]:
    """The counters of a call whose noise is x's: its step is less than ``steps``."""
    step = check_counter("step", step, steps, x)
    seed = check_counter("seed", seed, 2**64, x)
    return step, seed, check_first_sample(first_sample, x)
