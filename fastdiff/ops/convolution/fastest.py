"""Which products a CPU's convolution is made of: a pure function of what is known before a call.

The rule rests on the tables in benchmarks/results/convolution_plan, one for a machine and a number
of threads, which ``python benchmarks/measure_convolution_plan.py`` measures;
tests/ops/test_convolution_plan.py holds the rule and all of them together.
"""

import enum
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastdiff.ops import native


class Products(enum.IntEnum):
    """How a kernel multiplies (csrc/common/convolution.h).

    BFLOAT16: in AMX's tiles. SPLIT: so, float32 as the sum of two bfloat16, without the product of
    the smaller ones. WINOGRAD2 and WINOGRAD4: in float32, outputs in tiles of 2×2 and 4×4, of 3×3
    kernels without a stride (Lavin & Gray 2016, arXiv:1509.09308). PAIRS: bfloat16, two channels
    with an instruction (AVX512_BF16).
    """

    FLOAT32 = 0
    BFLOAT16 = 1
    SPLIT = 2
    WINOGRAD2 = 3
    WINOGRAD4 = 4
    PAIRS = 5


def possible(dtype: torch.dtype, kernel: tuple[int, ...], stride: int) -> list[Products]:
    """What serves here without rounding the values of ``dtype`` any further than to the 16 bits
    that two bfloat16 hold."""
    half = dtype == torch.bfloat16
    found = [Products.FLOAT32]
    for products in (Products.PAIRS, Products.BFLOAT16) if half else (Products.SPLIT,):
        if native.library().convolution_serves(int(products)):
            found.append(products)
    if kernel == (3, 3) and stride == 1:
        found += [Products.WINOGRAD2, Products.WINOGRAD4]
    return found


class Units(NamedTuple):
    """What a CPU multiplies bfloat16 with. ``amx``: in tiles; ``pairs``: by instructions for pairs,
    where these take no longer than those for float32."""

    amx: bool
    pairs: bool


def units() -> Units:
    """Of this CPU."""
    pays = native.library().convolution_pays
    return Units(pays(int(Products.SPLIT)), pays(int(Products.PAIRS)))


def products_of(dtype: torch.dtype) -> Products:
    """What multiplies fastest here of what serves every kernel and stride."""
    return _in_bfloat16(dtype, units())[0]


class Workload(NamedTuple):
    """What decides. ``height``, ``width``: of the output."""

    dtype: torch.dtype
    samples: int
    channels: int
    out_channels: int
    height: int
    width: int
    kernel: tuple[int, ...]
    stride: int
    units: Units
    upsample: bool = False


def fastest(work: Workload, *, exact: bool = False) -> tuple[Products, str]:
    """The products, and the reason in words. ``exact``: by float32 multiplications of the values
    themselves, in float32 neither in pieces nor transformed."""
    if exact and work.dtype != torch.bfloat16:
        return Products.FLOAT32, "products of the values themselves were asked for"
    found, why = _in_bfloat16(work.dtype, work.units)
    if found != Products.FLOAT32:
        return found, why
    if work.kernel != (3, 3) or work.stride != 1:
        return found, f"{why}, and Winograd's algorithm is for 3×3 kernels without a stride"
    tiles = work.samples * -(-work.height // 4) * -(-work.width // 4)
    # Tiles of 4×4 take 9/16 of the multiplications of tiles of 2×2, and read 9/4 of the weights.
    if tiles * WEIGHTS_PER_TILE >= work.channels * work.out_channels:
        return Products.WINOGRAD4, "in tiles of 4×4 a quarter of the multiplications remain"
    return Products.WINOGRAD2, f"tiles of 2×2: for {tiles} of 4×4 too many weights would be read"


def _in_bfloat16(dtype: torch.dtype, units: Units) -> tuple[Products, str]:
    """Products in bfloat16 that pay, or float32's, for any kernel and stride."""
    if dtype != torch.bfloat16:
        if units.amx:
            return Products.SPLIT, "three products of bfloat16 pieces in AMX's tiles are faster"
        return Products.FLOAT32, "without AMX float32 is multiplied as it is"
    if units.amx:
        return Products.BFLOAT16, "AMX multiplies bfloat16 in tiles"
    if units.pairs:
        return Products.PAIRS, "an instruction multiplies bfloat16 two channels at a time"
    return Products.FLOAT32, "bfloat16 is multiplied as float32, which is no slower on this CPU"


def fastest_once(
    dtype: torch.dtype, weight: Sequence[int], positions: int, stride: int
) -> Products:
    """The products for a weight of this shape that is packed for one call with so many outputs, as
    in training, where Winograd's algorithm has to save what the transformed weights cost."""
    found = products_of(dtype)
    serves = tuple(weight[2:]) == (3, 3) and stride == 1
    pays = positions >= TRANSFORMED_POSITIONS and min(weight[:2]) >= TRANSFORMED_CHANNELS
    return Products.WINOGRAD4 if found == Products.FLOAT32 and serves and pays else found


def folded_is_faster(work: Workload) -> bool:
    """Whether a doubling before a direct convolution is better done by sums of taps: 4/9 of the
    products, by 16/9 of the weights, which in a network come from memory. Of one sample's size: it
    rounds otherwise, and an image is to be the same in any batch."""
    outputs = work.height * work.width
    return work.upsample and work.stride == 1 and outputs >= FOLDED_OUTPUTS


WEIGHTS_PER_TILE = 8192
FOLDED_OUTPUTS = 256
# Forward and backward are then 1.1 to 1.4 times as fast as PyTorch's in float32 (one thread of a
# Xeon without its AMX, and with AVX2 alone), and no slower from half of it on.
TRANSFORMED_POSITIONS, TRANSFORMED_CHANNELS = 1024, 48
