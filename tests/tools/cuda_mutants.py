"""Broken copies of the CUDA kernels: one library for the emulation holds them all.

A copy of csrc/ has a switch at every place that a mutant breaks; FASTDIFF_MUTANT, read when the
library is loaded, closes one of them, for the launches of one kernel. Without it the copy computes
what the repository's sources do.
"""

from mutants import Mutant, replaced
from mutants import with_switches as with_switches_of

NORM = ("tests/ops/test_group_norm_silu_cuda.py", "-k", "cutting or order_of_threads")
NOISE = ("tests/ops/test_rng_cuda.py",)
ELEMENTWISE = ("tests/ops/test_elementwise_cuda.py",)


FORWARD, BACKWARD = "group_norm_silu", "group_norm_silu_backward"
MUTANTS = [
    Mutant(
        "deviations are taken before the mean is there",
        FORWARD,
        "group_norm_silu.cu",
        "shared.moments[group].mean = mean;\n  }\n  __syncthreads();",
        "shared.moments[group].mean = mean;\n  }\n  if (!BROKEN) __syncthreads();",
        NORM,
        short=True,
    ),
    Mutant(
        "a neighbour's moments are read before they are there",
        FORWARD,
        "group_norm_silu.cu",
        "      return;\n    }\n    sync_parts(tile);",
        "      return;\n    }\n    BROKEN ? __syncthreads() : sync_parts(tile);",
        NORM,
    ),
    Mutant(
        "a block ends while a neighbour reads its memory",
        FORWARD,
        "group_norm_silu.cu",
        "  if constexpr (kPass == Pass::kWhole) {\n    sync_parts(tile);",
        "  if constexpr (kPass == Pass::kWhole) {\n"
        "    BROKEN ? __syncthreads() : sync_parts(tile);",
        NORM,
    ),
    Mutant(
        "what is held is one pack further",
        FORWARD,
        "group_norm.h",
        "return row * columns + column; }",
        "return row * columns + column + BROKEN; }",
        NORM,
    ),
    Mutant(
        "the coefficients are read before all are written",
        BACKWARD,
        "group_norm_silu_backward.cu",
        "    }\n  }\n  __syncthreads();\n\n  if constexpr (kPass != Pass::kSecond) {",
        "    }\n  }\n  if (!BROKEN) __syncthreads();\n\n  if constexpr (kPass != Pass::kSecond) {",
        NORM,
    ),
    Mutant(
        "a neighbour's totals are read before they are there",
        BACKWARD,
        "group_norm_silu_backward.cu",
        "      return;\n    }\n    sync_parts(tile);",
        "      return;\n    }\n    BROKEN ? __syncthreads() : sync_parts(tile);",
        NORM,
        short=True,
    ),
    Mutant(
        "the sums of a channel go to its neighbour",
        BACKWARD,
        "group_norm_silu_backward.cu",
        "  sums[index] = dv;",
        "  sums[index + BROKEN] = dv;",
        NORM,
    ),
    Mutant(
        "the last element is one too far",
        "normal",
        "normal.cu",
        "if (element >= elements) break;",
        "if (element >= elements + BROKEN) break;",
        NOISE,
        short=True,
    ),
    Mutant(
        "a tile of noise is overwritten while it is read",
        "posterior_step",
        "elementwise.h",
        "      __syncthreads();  // the tile before has been read\n",
        "      if (!BROKEN) __syncthreads();\n",
        ELEMENTWISE,
        short=True,
    ),
    Mutant(
        "the row after the last is read",
        "posterior_step",
        "posterior_step.cu",
        "i < 0 || i >= rows",
        "i < 0 || i >= rows + BROKEN",
        ELEMENTWISE,
    ),
    Mutant(
        "the slot after the row's is written",
        "posterior_step",
        "posterior_step.cu",
        "start.row.slot == static_cast<float>(output - kKept)",
        "start.row.slot == static_cast<float>(output - kKept - BROKEN)",
        ELEMENTWISE,
    ),
    Mutant(
        "memory is read that the row has no factor for",
        "posterior_step",
        "posterior_step.cu",
        "if (memory_factor(start.row, slot) == 0.0f) start.reads",
        "if (!BROKEN && memory_factor(start.row, slot) == 0.0f) start.reads",
        ELEMENTWISE,
    ),
    Mutant(
        "a tile of noise is read before it is drawn",
        "q_sample",
        "elementwise.h",
        "drawn());\n      __syncthreads();",
        "drawn());\n      if (!BROKEN) __syncthreads();",
        ELEMENTWISE,
    ),
    Mutant(
        "the row after the last is read",
        "q_sample",
        "q_sample.cu",
        "i < 0 || i >= rows",
        "i < 0 || i >= rows + BROKEN",
        ELEMENTWISE,
        short=True,
    ),
]

SWITCH = """
#include <cstdlib>

namespace fastdiff::emulation {
struct Mutant {
  int number = 0;
  std::string kernel;
};
inline const Mutant mutant = [] {
  const char* const wanted = std::getenv("FASTDIFF_MUTANT");  // "3 group_norm_silu"
  if (wanted == nullptr) return Mutant{};
  char* end;
  const long number = std::strtol(wanted, &end, 10);
  return Mutant{static_cast<int>(number), end + 1};
}();
inline int broken = 0;  // the mutant's number while its kernel runs
}  // namespace fastdiff::emulation
"""
LAUNCH = "void launch(const Launch& how, const Arguments&... arguments) {\n"
CHOOSE = (
    "  emulation::broken = emulation::mutant.kernel == how.name ? emulation::mutant.number : 0;\n"
)


def environment(mutant: Mutant) -> dict[str, str]:
    return {"FASTDIFF_MUTANT": f"{MUTANTS.index(mutant) + 1} {mutant.kernel}"}


def with_switches(path: str, source: str) -> str:
    """The text of a file of csrc/ with the switches of all mutants."""
    if path == "emulation/emulation.h":
        return source + SWITCH
    if path == "cuda/launch.h":
        return replaced(source, LAUNCH, LAUNCH + CHOOSE)
    folder, _, file = path.partition("/")
    if folder != "cuda":
        return source
    return with_switches_of(source, file, MUTANTS, "fastdiff::emulation::broken")
