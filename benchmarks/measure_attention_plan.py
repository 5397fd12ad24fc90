"""Measures what attention's plan rests on: python benchmarks/measure_attention_plan.py

Every implementation of attention on the CPU, turn by turn in one process, over the shapes of the
published U-Nets at batch 1 and 8 and a grid beside them, in both layouts, with and without the
backward. OMP_NUM_THREADS says on how many threads; a second run betters the rows of the first.
Writes benchmarks/results/attention_plan/<device>-<n>-threads.json; tests/ops/test_attention_plan.py
checks that the rule in fastdiff/ops/attention/fastest.py picks (nearly) the fastest in every row of
every table.
"""

from collections.abc import Callable, Iterator

import torch

from fastdiff.ops.attention.op import run
from fastdiff.ops.backends import short
from harness.plan_tables import measure_table

PUBLISHED = [  # heads, tokens, head_dim
    *[(1, 256, 256), (1, 16, 256), (1, 256, 512), (1, 64, 512), (4, 256, 64), (4, 64, 64)],
    *[(4, 16, 64), (4, 256, 96), (4, 64, 128), (4, 256, 144), (4, 64, 192), (6, 1024, 64)],
    *[(9, 256, 64), (12, 64, 64)],
]
BESIDE = [(2, 128, 32), (8, 128, 64), (1, 1024, 128), (2, 512, 8), (1, 100, 40), (16, 32, 128)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cases() -> Iterator[dict]:
    for dtype in DTYPES:
        for heads, tokens, head_dim in PUBLISHED + BESIDE:
            for samples in (1, 8):
                if samples * heads * tokens**2 * head_dim > 1 << 29:
                    continue  # ADM-64 at batch 8 is as at batch 1, only longer
                for token_major in (True, False):
                    for training in (False, True):
                        yield {
                            "dtype": short(dtype),
                            "samples": samples,
                            "heads": heads,
                            "tokens": tokens,
                            "head_dim": head_dim,
                            "token_major": token_major,
                            "training": training,
                        }


def steps(case: dict) -> dict[str, Callable[[], None]]:
    """Every implementation, to be timed."""
    dtype = getattr(torch, case["dtype"])
    channels = case["heads"] * case["head_dim"]
    qkv = torch.randn(case["samples"], case["tokens"], 3 * channels).to(dtype).transpose(1, 2)
    grad = torch.randn(case["samples"], case["tokens"], channels).to(dtype).transpose(1, 2)
    if not case["token_major"]:
        qkv = qkv.contiguous()
    qkv.requires_grad_(case["training"])

    def step(implementation: str) -> Callable[[], None]:
        def forward() -> None:
            with torch.no_grad():
                run(implementation, qkv, case["heads"], "heads_first")

        def both() -> None:
            qkv.grad = None
            run(implementation, qkv, case["heads"], "heads_first").backward(grad)

        return both if case["training"] else forward

    names = ["native", "sdpa"]
    if case["training"] and dtype != torch.float32:
        names.append("matmuls")
    return {name: step(name) for name in names}


if __name__ == "__main__":
    measure_table("attention_plan", cases(), steps, __doc__)
