"""explain: which implementation would serve a call, and why."""

from collections.abc import Callable
from typing import Any

from fastdiff.errors import InputError
from fastdiff.ops.attention.op import choose as choose_attention
from fastdiff.ops.backends import Choice
from fastdiff.ops.group_norm_silu.op import choose as choose_group_norm_silu
from fastdiff.ops.posterior_step.op import choose as choose_posterior_step
from fastdiff.ops.q_sample.op import choose as choose_q_sample
from fastdiff.ops.rms_norm_silu.op import choose as choose_rms_norm_silu

# Each takes its operation's own arguments.
CHOOSERS: dict[str, Callable[..., Choice]] = {
    "attention": choose_attention,
    "group_norm_silu": choose_group_norm_silu,
    "posterior_step": choose_posterior_step,
    "q_sample": choose_q_sample,
    "rms_norm_silu": choose_rms_norm_silu,
}


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Choice:
    """Print, and return, which backend would serve ``op(*args, **kwargs)`` now and why.

    ``op`` is one of ``fastdiff.ops`` or its name: ``explain("attention", qkv, 4)``. Nothing is
    computed. Raises InputError for an unknown operation and for a named backend that cannot serve.
    For what ``accelerate`` did to a model see ``fastdiff.report``.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in CHOOSERS:
        raise InputError(f"op is {name!r}; expected one of {', '.join(CHOOSERS)}")
    choice = CHOOSERS[name](*args, **kwargs)
    print(choice)
    return choice
