"""Every CUDA kernel launched once or twice, and nothing else: for compute-sanitizer to watch.

compute-sanitizer --tool memcheck python -m gpu.launches --out FOLDER [--dry]
"""

import sys
from collections.abc import Sequence

import torch

import fastdiff
from fastdiff.ops.dispatch import OPERATIONS, problem
from gpu import lines, smoke
from gpu.cases import cases


def main(argv: Sequence[str] | None = None) -> int:
    given = lines.arguments(__doc__, argv)
    device, backend = (torch.device("cpu"), None) if given.dry else (torch.device("cuda"), "cuda")
    launched = 0
    for case in cases(device, given.dry):
        x = case.tensors[0]
        if backend and problem(OPERATIONS[case.op], backend, x.device, x.dtype):
            continue
        with fastdiff.backend(backend):
            for direction in ("forward", "backward")[: 1 + case.is_differentiable]:
                smoke.results(case.call, case.tensors, direction)
                launched += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    lines.write(given.out, "launches", ok=launched > 0, calls=launched)
    return 0 if launched else 1


if __name__ == "__main__":
    sys.exit(main())
