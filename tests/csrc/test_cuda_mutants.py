"""Broken copies of the CUDA kernels, each of which the suites must catch in the emulation.

A barrier is taken out or an index is moved by one; the broken file is compiled and linked with the
other objects of the sanitized build.
"""

import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

import sanitized as tools

pytestmark = pytest.mark.slow
NORM = ("tests/ops/test_group_norm_silu_cuda.py", "-k", "cutting or order_of_threads")
NOISE = ("tests/ops/test_rng_cuda.py",)
ELEMENTWISE = ("tests/ops/test_elementwise_cuda.py",)


class Mutant(NamedTuple):
    what: str
    kernel: str  # the file that is compiled
    file: str  # the one that is changed
    before: str  # occurs once
    after: str
    suite: tuple[str, ...]
    always: bool = True  # not only with --exhaustive: one of a kind for every kernel


FORWARD, BACKWARD = "group_norm_silu.cu", "group_norm_silu_backward.cu"
MUTANTS = [
    Mutant(
        "deviations are taken before the mean is there",
        FORWARD,
        FORWARD,
        "shared.moments[group].mean = mean;\n  }\n  __syncthreads();",
        "shared.moments[group].mean = mean;\n  }",
        NORM,
    ),
    Mutant(
        "a neighbour's moments are read before they are there",
        FORWARD,
        FORWARD,
        "      return;\n    }\n    sync_parts(tile);",
        "      return;\n    }\n    __syncthreads();",
        NORM,
        always=False,
    ),
    Mutant(
        "a block ends while a neighbour reads its memory",
        FORWARD,
        FORWARD,
        "  if constexpr (kPass == Pass::kWhole) {\n    sync_parts(tile);",
        "  if constexpr (kPass == Pass::kWhole) {\n    __syncthreads();",
        NORM,
    ),
    Mutant(
        "what is held is one pack further",
        FORWARD,
        "group_norm.h",
        "return row * columns + column; }",
        "return row * columns + column + 1; }",
        NORM,
        always=False,
    ),
    Mutant(
        "the coefficients are read before all are written",
        BACKWARD,
        BACKWARD,
        "    }\n  }\n  __syncthreads();\n\n  if constexpr (kPass != Pass::kSecond) {",
        "    }\n  }\n\n  if constexpr (kPass != Pass::kSecond) {",
        NORM,
        always=False,
    ),
    Mutant(
        "a neighbour's totals are read before they are there",
        BACKWARD,
        BACKWARD,
        "      return;\n    }\n    sync_parts(tile);",
        "      return;\n    }\n    __syncthreads();",
        NORM,
    ),
    Mutant(
        "the sums of a channel go to its neighbour",
        BACKWARD,
        BACKWARD,
        "  sums[index] = dv;",
        "  sums[index + 1] = dv;",
        NORM,
        always=False,
    ),
    Mutant(
        "the last element is one too far",
        "normal.cu",
        "normal.cu",
        "if (element >= elements) break;",
        "if (element > elements) break;",
        NOISE,
    ),
    Mutant(
        "a tile of noise is overwritten while it is read",
        "posterior_step.cu",
        "elementwise.h",
        "        __syncthreads();  // the tile before has been read\n",
        "",
        ELEMENTWISE,
    ),
    Mutant(
        "the row after the last is read",
        "posterior_step.cu",
        "posterior_step.cu",
        "i < 0 || i >= rows",
        "i < 0 || i > rows",
        ELEMENTWISE,
        always=False,
    ),
    Mutant(
        "a tile of noise is read before it is drawn",
        "q_sample.cu",
        "elementwise.h",
        "        __syncthreads();\n#pragma unroll",
        "#pragma unroll",
        ELEMENTWISE,
        always=False,
    ),
    Mutant(
        "the row after the last is read",
        "q_sample.cu",
        "q_sample.cu",
        "i < 0 || i >= rows",
        "i < 0 || i > rows",
        ELEMENTWISE,
    ),
]


def compiled(mutant: Mutant, sanitized: tools.Build, folder: Path) -> Path:
    """The sanitized library with one of its CUDA kernels broken."""
    csrc = folder / "csrc"
    shutil.copytree(tools.ROOT / "csrc", csrc)
    broken = csrc / "cuda" / mutant.file
    source = broken.read_text()
    assert source.count(mutant.before) == 1, "write the mutation for what the kernel is now"
    broken.write_text(source.replace(mutant.before, mutant.after))
    sanitize = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g1", "-fPIC"]
    subprocess.run(
        ["g++", "-x", "c++", "-std=c++17", "-O0", *sanitize, "-ffp-contract=off", "-w"]
        + [
            "-DFASTDIFF_EMULATION",
            f"-I{csrc / 'emulation'}",
            "-c",
            str(csrc / "cuda" / mutant.kernel),
        ]
        + ["-o", str(folder / "broken.o")],
        check=True,
    )
    objects = [str(path) for path in sanitized.objects if path.name != f"{mutant.kernel}.o"]
    library = folder / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(
        ["g++", "-shared", "-fsanitize=address,undefined", *objects, str(folder / "broken.o")]
        + ["-o", str(library)],
        check=True,
    )
    return library


@pytest.fixture(scope="module")
def outcomes(request, sanitized, tmp_path_factory):
    """Of every mutant its suite's process; as many run at a time as there are processors."""
    exhaustive = request.config.getoption("--exhaustive")
    chosen = [mutant for mutant in MUTANTS if mutant.always or exhaustive]
    folders = [tmp_path_factory.mktemp("mutant") for _ in chosen]

    def run(mutant, folder):
        library = compiled(mutant, sanitized, folder)
        return sanitized.run_tests("-m", "any_backend", *mutant.suite, library=library)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(chosen, pool.map(run, chosen, folders), strict=True))


@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(
            mutant,
            marks=() if mutant.always else pytest.mark.exhaustive,
            id=f"{mutant.kernel}: {mutant.what}",
        )
        for mutant in MUTANTS
    ],
)
def test_a_broken_kernel_is_caught(outcomes, mutant):
    done = outcomes[mutant]
    output = done.stdout + done.stderr
    assert done.returncode != 0, output[-3000:]
    # By a wrong value or an error of the launch, or by a sanitizer, which ends the process.
    caught = "FAILED" in output or "AddressSanitizer" in output or "runtime error" in output
    assert caught, output[-3000:]
