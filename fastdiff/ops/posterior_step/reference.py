"""One sampler step as the step table's equations write it (see fastdiff/methods/table.py)."""

import torch


def posterior_step(
    x_t: torch.Tensor,
    output: torch.Tensor,
    row: dict[str, torch.Tensor],
    *,
    variance_output: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    x_start_before: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_prev, x_start) from x_t and the network's output, all (N, C, ...) in float32.

    ``row`` maps the table's column names to scalars. ``z`` is N(0, I), ``x_start_before`` the
    x_start of the row before; without them their terms are left out.
    """
    x_start = (row["a"] * x_t + row["b"] * output).clamp(-row["clip"], row["clip"])
    std = row["sigma"]
    if variance_output is not None:
        std = std * torch.exp(0.5 * log_variance(variance_output, row["log_min"], row["log_max"]))
    x_prev = _times(row["c"], x_start) + _times(row["d"], x_t) + _times(row["o"], output)
    if x_start_before is not None:
        x_prev = x_prev + _times(row["e"], x_start_before)
    if z is not None:
        x_prev = x_prev + torch.where(row["sigma"] != 0, std * z, 0.0)
    return x_prev, x_start


def log_variance(
    v: torch.Tensor, log_min: torch.Tensor | float, log_max: torch.Tensor | float
) -> torch.Tensor:
    """v in [−1, 1] spans log_min … log_max; not clamped (Nichol & Dhariwal 2021, eq. 15)."""
    fraction = (v + 1) / 2
    return fraction * log_max + (1 - fraction) * log_min


def _times(coefficient: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """coefficient·value, where a zero coefficient gives 0 even for a value that is not finite."""
    return torch.where(coefficient != 0, coefficient * value, 0.0)


def guide(output: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """Classifier-free guidance (Ho & Salimans 2022): (2N, ...), conditional first, → (N, ...)."""
    conditional, unconditional = output.chunk(2)
    return unconditional + scale * (conditional - unconditional)
