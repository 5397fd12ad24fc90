"""How OpenMP's threads wait for each other: what the ``fastdiff`` command chooses before torch.

Threads that wait for another one spin, by the runtime's own policy for milliseconds. Beside other
busy processes each then holds a core that the one they wait for needs. Milliseconds of a step of
the CIFAR-10 U-Net at batch 1, two threads on two cores, alone and beside busy processes
(``python benchmarks/measure_wait_policy.py`` measures them):

    spins before sleep      alone   1 busy   2 busy
    the runtime's own          50      187    1,700
    10,000                     53      187
    1,000                   55-60       85       65

So the command lets them spin 1,000 times: a tenth to a fifth slower alone and at batch 1, where a
layer takes less time than waking a thread does, against a tenth of the speed and less beside
others; shared machines are the rule.

The runtime reads its environment once, when torch loads it, so the choice is made before torch is
imported, and by the command alone: ``import fastdiff`` leaves the environment of somebody's program
as it is. Whatever the environment says already is left alone too. This file imports nothing of
fastdiff: whoever starts processes (tests/conftest.py) can run it by itself.
"""

import os
import sys
from collections.abc import MutableMapping

CHOICE = {
    "GOMP_SPINCOUNT": "1000",  # GNU's runtime, which PyTorch's packages for Linux bring
    "KMP_BLOCKTIME": "1",  # Intel's and LLVM's, in ms; 200 by default
}
# Who has set one of these has decided.
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")

_chosen = False


def choose_for_command() -> None:
    """``choose``, where this process is the ``fastdiff`` command and has not loaded torch yet."""
    if "torch" not in sys.modules and _is_command(sys.argv, sys.orig_argv):
        choose()


def choose(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set ``CHOICE``, unless one of ``VARIABLES`` is set."""
    global _chosen
    if not any(environment.get(name) for name in VARIABLES):
        environment.update(CHOICE)
        _chosen = True


def described() -> str:
    """What this process waits by, and who chose it (``fastdiff info``)."""
    settings = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    if not settings:
        return (
            "the OpenMP runtime's own (only the fastdiff command chooses, before torch is loaded)"
        )
    who = "fastdiff's choice" if _chosen else "set in the environment"
    return f"{' '.join(f'{name}={value}' for name, value in settings.items())} ({who})"


def _is_command(argv: list[str], orig_argv: list[str]) -> bool:
    """Whether Python was started for the script ``fastdiff`` or as ``python -m fastdiff``."""
    program = argv[0] if argv else ""
    if program != "-m":
        return os.path.basename(program) == "fastdiff"
    # While the module is looked for; its name stands before the arguments that it gets.
    return orig_argv[-len(argv)].removeprefix("-m") in ("fastdiff", "fastdiff.cli")
