"""diffusers' own tests of the schedulers that are fused, with ours in place of its.

    python tests/tools/diffusers_own_tests.py CHECKOUT [pytest's options]

CHECKOUT is a checkout of github.com/huggingface/diffusers, best of the installed release's tag;
diffusers itself is the installed one. Their test_compatibles makes every scheduler there is and
needs torchsde. Prints how many steps were fused, how many were diffusers' own, and why; exits with
pytest's status, or with 1 if one of our schedulers took no fused step.
"""

import collections
import sys
from pathlib import Path

import diffusers
import pytest

from fastdiff.integrations import diffusers as ours

TESTS = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DEISMultistepScheduler": "deis",
    "DPMSolverMultistepScheduler": "dpm_multi",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "EulerDiscreteScheduler": "euler",
    "HeunDiscreteScheduler": "heun",
    "PNDMScheduler": "pndm",
    "UniPCMultistepScheduler": "unipc",
}
FUSED = "fused"


def count_steps(scheduler_class):
    """A Counter, from now on, of this class's steps by what takes them."""
    counts = collections.Counter()
    plan = scheduler_class._plan

    def counted(self, *arguments, **options):
        planned = plan(self, *arguments, **options)
        counts[f"diffusers' own: {planned}" if isinstance(planned, str) else FUSED] += 1
        return planned

    scheduler_class._plan = counted
    return counts


def main(checkout, *options):
    counts = {}
    for name in TESTS:
        counts[name] = count_steps(getattr(ours, name))
        setattr(diffusers, name, getattr(ours, name))
    folder = Path(checkout) / "tests" / "schedulers"
    files = [folder / f"test_scheduler_{test}.py" for test in TESTS.values()]
    status = pytest.main(["--rootdir", checkout, *map(str, files), *options])
    for name, steps in counts.items():
        for what, count in steps.most_common():
            print(f"{name}: {count} steps {what}")
    return int(status) or int(not all(steps[FUSED] for steps in counts.values()))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
