"""diffusers' ``UNet2DModel`` as fastdiff's U-Net."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.models.execution.foreign import Foreign
from fastdiff.models.execution.problems import FREE
from fastdiff.models.fused import unfused
from fastdiff.models.readers.diffusers.config import CLASS, FIELDS, unet_arguments
from fastdiff.models.readers.diffusers.names import module_names
from fastdiff.models.unet import UNet


class UNet2D(Foreign):
    classes = (("diffusers.models.unets.unet_2d", CLASS),)
    free = FREE | {"_internal_dict", "sample_size", "dropout"}
    free |= {"gradient_checkpointing", "_gradient_checkpointing_func"}
    names = {"sample": "x", "timestep": "timesteps", "class_labels": "y"}

    def settings(self) -> tuple[dict[str, Any], dict[str, Any]]:
        config: Any = self.module.config
        try:
            plain = json.loads(json.dumps(dict(config)))
        except TypeError:
            raise InputError(f"its config is no {CLASS}'s") from None
        return {name: config[name] for name in FIELDS if name in config}, unet_arguments(plain)

    def layers(self, unet: UNet) -> Mapping[str, Sequence[str]]:
        return module_names(unet)

    def answer(self, output: Tensor, given: Mapping[str, Any]) -> Any:
        if not given.get("return_dict", True):
            return (output,)
        module: Any = sys.modules[unfused(type(self.module)).__module__]
        return module.UNet2DOutput(sample=output)


READING = UNet2D
