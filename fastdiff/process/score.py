"""The score ∇ log q(x_t), read off a network that was trained to denoise, alike for every process.

With q(x_t | x_0) = N(signal_t·x_0, noise_t²·I) it is, whatever the data (Robbins 1956; Vincent
2011; Song & Ermon 2019, arXiv:1907.05600),

    ∇ log q(x_t) = (signal_t·E[x_0 | x_t] − x_t) / noise_t² = −E[ε | x_t] / noise_t

and E[x_0 | x_t] = a·x_t + b·output, so that the score too is linear in x_t and the output.
"""

from typing import Any

from torch import Tensor

from fastdiff.methods.levels import Float64Array, Levels, Source, is_learned
from fastdiff.methods.protocol import Process, noise_levels
from fastdiff.process.reverse import Model, call_model
from fastdiff.process.tables import Tables


class Scored(Process):
    """A process whose network gives the score."""

    _score_tables: Tables | None = None  # made at the first use

    def score(
        self, model: Model, x: Tensor, t: Tensor, model_kwargs: dict[str, Any] | None = None
    ) -> Tensor:
        """∇ log q(x_t) at x_t = ``x`` by the network's estimate: −ε/noise_t, of x's shape.

        Its unit is 1/x. ``x`` (N, ...) float, not scaled for the network; ``t`` (N,) integer in
        0 … K − 1, the index into the process's steps (EDM's too). ``model`` is called as when it is
        sampled from; x_0 is not clipped, and the variance that it may have learned is not read.
        Float32, or float64 for float64 x. Exact for a network without error (Vincent 2011; Song &
        Ermon 2019, arXiv:1907.05600).

        Raises InputError for what does not fit, for a t out of range on the CPU (elsewhere that
        gives NaN), and for ε-prediction from a step without signal.
        """
        if self._score_tables is None:
            self._score_tables = Tables(score_tables(self))
        at = self._score_tables.at(t, x)
        given = (at["input_scale"] * x).to(x.dtype)
        output = call_model(self, model, given, at["model_timesteps"].flatten(), model_kwargs)
        if is_learned(self.var_type):
            output = output.chunk(2, dim=1)[0]
        return at["of_x_t"] * x.to(at.dtype) + at["of_output"] * output.to(at.dtype)


def score_tables(process: Process) -> dict[str, Float64Array]:
    """(K,) each: score = of_x_t·x_t + of_output·output, and what the network is given."""
    levels = Levels.of(*noise_levels(process))
    source = Source.of(levels, process)
    return {
        "of_x_t": (levels.signal * source.a - 1.0) / levels.noise**2,
        "of_output": levels.signal * source.b / levels.noise**2,
        "input_scale": process.input_scale,
        "model_timesteps": process.model_timesteps.astype("float64"),
    }
