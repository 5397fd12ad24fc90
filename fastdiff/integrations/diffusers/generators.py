"""One generator for a batch, or one for each of its samples."""

from typing import Any

import torch

from fastdiff.errors import InputError


def check_generators(generator: Any, batch: int, *, one_for_all: bool = True) -> None:
    """That there is one generator, or a list with one for each of ``batch`` samples.

    diffusers passes over the ones that are too many. A list of one counts as the generator itself,
    but not to its DDIMPipeline (``one_for_all=False``). InputError with both counts.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return
    kinds = {type(each) for each in generator} if isinstance(generator, list) else {type(generator)}
    strangers = [kind.__name__ for kind in kinds - {torch.Generator, type(None)}]
    if strangers or not isinstance(generator, list):
        came = (
            f"a list with a {strangers[0]}" if isinstance(generator, list) else f"a {strangers[0]}"
        )
        raise InputError(f"generator is {came}; expected a torch.Generator or a list of them")
    count = len(generator)
    if count != batch and not (count == 1 and one_for_all):
        raise InputError(
            f"{count} generator{'' if count == 1 else 's'} for a batch of {batch}; give one each"
        )
