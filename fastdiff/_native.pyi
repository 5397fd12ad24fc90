"""What csrc/bindings.cpp defines. Addresses are integers; nothing is checked on the other side."""

from typing import Any

INTERFACE: int

class NormalFill:
    def __init__(
        self,
        out: int,
        dtype: int,
        samples: int,
        channels: int,
        spatial: int,
        sample_stride: int,
        channel_stride: int,
        spatial_stride: int,
        seed: int,
        step: int,
        first_sample: int,
    ) -> None: ...

def build_info() -> dict[str, Any]: ...
def supported_isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def current_isa() -> str: ...
def team_size(threads: int) -> int: ...
def normal_cpu(fill: NormalFill, threads: int) -> None: ...
def philox_cpu(
    out: int, quads: int, seed: int, step: int, sample: int, first_quad: int
) -> None: ...

# Present where build_info()["cuda"] is not None.
def cuda_driver_version() -> int: ...
def normal_cuda(fill: NormalFill, seed_address: int, step_address: int, stream: int) -> None: ...
def philox_cuda(
    out: int, quads: int, seed: int, step: int, sample: int, first_quad: int, stream: int
) -> None: ...
