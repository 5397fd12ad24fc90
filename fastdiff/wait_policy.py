"""How OpenMP's threads wait for each other: what the ``fastdiff`` command chooses before torch.

Threads that wait for another one spin, by the runtime's own policy for milliseconds. Beside other
busy processes each then holds a core that the one they wait for needs. Milliseconds of a step, two
threads on two cores of an Intel Xeon with AMX, alone and beside busy processes (medians of two
processes for the first network, one for the second: a tenth is noise;
``python benchmarks/measure_wait_policy.py`` measures them):

                          CIFAR-10 U-Net, batch 1      digits, training, batch 32
    spins before sleep    alone  1 busy  2 busy        alone  1 busy  2 busy
    the runtime's own       121     482   1,393          128     494   4,624
    10,000                  139     340     326          144     482     368
    1,000                   131     258     340          180     233     256
    none (passive)          143     241     229          129     231     176

So the command lets them spin 1,000 times: about a tenth slower alone at batch 1, where a layer
takes less time than waking a thread does, against a half to a quarter of the time and less beside
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
