"""The bytes that an operation has to move: each operand read or written once."""

from collections.abc import Sequence

from torch import Tensor


def q_sample(x_start: Tensor, *, noise: Tensor | None = None, returns_drawn: bool = False) -> int:
    """x_start and x_t; the noise where it is given, or drawn and returned."""
    given = 0 if noise is None else noise.nbytes
    return x_start.nbytes * (2 + returns_drawn) + given


def posterior_step(
    x_t: Tensor,
    output: Tensor,
    *,
    learned: bool = False,
    noise: Tensor | None = None,
    unconditional: Tensor | None = None,
    memory: Sequence[Tensor] = (),
    kept: Tensor | None = None,
    returns_x_start: bool = True,
) -> int:
    """x_t and x_prev; of the output each half of the batch under guidance, and one learned
    variance; C channels of another network's; the noise where it is given, the slots of memory that
    the row reads, and the one that it writes; x_start where it is returned."""
    parts = len(output) // len(x_t) + learned
    said = x_t.numel() * output.itemsize * parts
    if unconditional is not None:
        said += x_t.numel() * unconditional.itemsize
    given = sum(0 if tensor is None else tensor.nbytes for tensor in (noise, kept, *memory))
    return x_t.nbytes * (2 + returns_x_start) + said + given
