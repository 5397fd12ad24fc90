"""The U-Nets of improved-diffusion and guided-diffusion, whose parameters have fastdiff's names."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fastdiff.errors import InputError
from fastdiff.models.execution.foreign import Foreign
from fastdiff.models.execution.problems import FREE
from fastdiff.models.fused import unfused
from fastdiff.models.resampling import CONVOLUTIONS
from fastdiff.models.unet import UNet

UPSAMPLER = "SuperResModel"
DIMS = {kind: dims for dims, kind in CONVOLUTIONS.items()}
# Arguments of the constructors that a network does not keep: they are seen by its parts.
SEEN = {
    "dims": lambda net: DIMS[type(net.input_blocks[0][0])],
    "use_scale_shift_norm": lambda net: net.middle_block[0].use_scale_shift_norm,
    "resblock_updown": lambda net: any(getattr(m, "updown", False) for m in net.modules()),
    "use_new_attention_order": lambda net: _is_new_order(net.middle_block[1].attention),
    "use_fp16": lambda net: str(net.dtype) == "torch.float16",
}
# Those that fastdiff's U-Net has not.
ALONE = {"use_fp16", "image_size"}


class UNetModel(Foreign):
    classes = tuple(
        (f"{package}.unet", name)
        for package in ("improved_diffusion", "guided_diffusion")
        for name in ("UNetModel", UPSAMPLER)
    )
    free = FREE | {"dropout"}
    names = {"x": "x", "timesteps": "timesteps", "y": "y", "low_res": "low_res"}

    def settings(self) -> tuple[dict[str, Any], dict[str, Any]]:
        network: Any = self.module
        kind = unfused(type(network))
        super_res = kind.__name__ == UPSAMPLER
        constructor = kind.__mro__[1] if super_res else kind
        try:
            theirs = {
                name: SEEN[name](network) if name in SEEN else getattr(network, name)
                for name in list(inspect.signature(constructor.__init__).parameters)[1:]
            }
            if super_res:
                theirs["in_channels"] //= 2
            levels = [2**level for level in range(len(theirs["channel_mult"]))]
            attended = [ds for ds in levels if ds in theirs["attention_resolutions"]]
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise InputError(f"its parts are not those of a {kind.__name__} ({error})") from None
        ours = {name: value for name, value in theirs.items() if name not in ALONE}
        return theirs, ours | {"attention_resolutions": attended, "super_res": super_res}

    def layers(self, unet: UNet) -> Mapping[str, Sequence[str]]:
        return {name: [name] for name, _ in unet.named_modules()}


def _is_new_order(attention: nn.Module) -> bool:
    """[Q | K | V]: guided-diffusion's class of that name, which in improved-diffusion is another's
    and is not asked for."""
    return type(attention).__name__ == "QKVAttention"


READING = UNetModel
