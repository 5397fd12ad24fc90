"""What the integrations pass on to ``fastdiff.Sampler``."""

from typing import Any

from fastdiff.methods.table import StepTable
from fastdiff.sampling.sampler import Sampler


def check_sampler_options(**options: Any) -> None:
    """InputError for options that a Sampler would refuse, before anything is changed."""
    Sampler(lambda x, t: x, StepTable.from_rows([{"timesteps": 0.0}]), **options)
