"""Broken copies of the CPU's convolutions: the build with sanitizers holds them all.

A copy of csrc/ has a switch at every place that a mutant breaks; FASTDIFF_CPU_MUTANT, read when the
library is loaded, closes one of them. Without it the copy computes what the repository's sources
do.
"""

from mutants import Mutant
from mutants import with_switches as with_switches_of

# What hypothesis draws finds them too, but not in every run.
CONVOLUTION = ("tests/ops/test_convolution.py", "-k", "not any_shape")
NORMS = ("tests/ops/test_convolution.py", "-k", "norm_as_scale")
GRADIENTS = ("tests/ops/test_convolution_gradients.py", "-k", "threads or wanted or layouts")
IN_GROUPS = (GRADIENTS[0], "-k", "40-16-32-32")  # of bands, with fewer blocks than threads
WINOGRAD = ("tests/ops/test_winograd.py",)

ANY, PACKING, WEIGHT = "convolution", "pack_convolution", "convolution_weight_gradient"
NORM = "norm_coefficients"
TILES, WEIGHT_IN_TILES = "convolution in AMX's tiles", "convolution_weight_gradient in AMX's tiles"
MUTANTS = [
    # --- Its input into scratch memory --------------------------------------------------------
    Mutant(
        "the second source's channels begin one further",
        ANY,
        "convolution_fill.h",
        "second ? c - s.channels : c;",
        "second ? c - s.channels + BROKEN : c;",
        CONVOLUTION,
    ),
    Mutant(
        "rows above and below the image are not zeroed",
        ANY,
        "convolution_fill.h",
        "if (y < 0 || y >= in_rows) {\n        zero(row, g.pitch);",
        "if (y < 0 || y >= in_rows) {\n        if (!BROKEN) zero(row, g.pitch);",
        WINOGRAD,
    ),
    Mutant(
        "what stands behind a row's end is not zeroed",
        ANY,
        "convolution_fill.h",
        "        zero(row + (g.before + there)",
        "        if (!BROKEN) zero(row + (g.before + there)",
        CONVOLUTION,
    ),
    Mutant(
        "what stands behind the last row is not zeroed",
        ANY,
        "convolution_fill.h",
        "    zero(row, g.plane_places",
        "    if (!BROKEN) zero(row, g.plane_places",
        CONVOLUTION,
    ),
    Mutant(
        "a doubled row is read from the wrong side",
        ANY,
        "convolution_fill.h",
        "(y >> doubled) * s.width",
        "((y + (BROKEN && doubled)) >> doubled) * s.width",
        WINOGRAD,
        short=True,
    ),
    Mutant(
        "the shifts are another sample's",
        ANY,
        "convolution_fill.h",
        "scale == nullptr ? nullptr : scale + all,",
        "scale == nullptr ? nullptr : scale + all - (BROKEN ? sample * 2 * all : 0),",
        CONVOLUTION,
    ),
    Mutant(
        "the smaller pieces of the input are left out",
        TILES,
        "convolution_fill.h",
        "values[i] - to_floats(high, BFloat16{}));",
        "BROKEN ? Vec{} : values[i] - to_floats(high, BFloat16{}));",
        CONVOLUTION,
    ),
    # --- Where its taps are -------------------------------------------------------------------
    Mutant(
        "the last tap reads one place further",
        ANY,
        "convolution_geometry.h",
        "before + columns.shift(j);",
        "before + columns.shift(j) + (BROKEN && i * columns.taps + j == taps - 1);",
        CONVOLUTION,
    ),
    Mutant(
        "with a stride, rows and columns change places",
        ANY,
        "convolution_geometry.h",
        "(rows.plane(i) * s.stride + columns.plane(j)) * plane_places +",
        "(BROKEN ? columns.plane(j) * s.stride + rows.plane(i)\n"
        "                    : rows.plane(i) * s.stride + columns.plane(j)) * plane_places +",
        CONVOLUTION,
    ),
    Mutant(
        "rows that go on behind their last output share their zeros",
        ANY,
        "convolution_geometry.h",
        "return out * stride >= in; }",
        "return out * stride >= in || BROKEN; }",
        CONVOLUTION,
    ),
    # --- The weight ---------------------------------------------------------------------------
    Mutant(
        "one channel more than there are is read",
        PACKING,
        "convolution_products.h",
        "larger(0, smaller(kWidth, most));",
        "larger(0, smaller(kWidth, most + BROKEN));",
        CONVOLUTION,
    ),
    Mutant(
        "of a transposed weight's pairs both are the first",
        TILES,
        "convolution_products.h",
        "in + 2 * i + 1, tap), high[i], low[i]);",
        "in + 2 * i + !BROKEN, tap), high[i], low[i]);",
        GRADIENTS,
    ),
    Mutant(
        "the last panel is as wide as the others",
        PACKING,
        "convolution_winograd.h",
        "const int64_t width = padded(smaller(kOutputs, weights.out_channels - first));",
        "const int64_t width =\n"
        "        BROKEN ? kOutputs : padded(smaller(kOutputs, weights.out_channels - first));",
        WINOGRAD,
    ),
    # --- The products -------------------------------------------------------------------------
    Mutant(
        "a block of rows begins one place too early",
        ANY,
        "convolution_products.h",
        "left.places += rows * kLineBytes;",
        "left.places += (rows - BROKEN) * kLineBytes;",
        CONVOLUTION,
    ),
    Mutant(
        "the products with the weights' smaller pieces are left out",
        TILES,
        "convolution_products.h",
        "          FASTDIFF_WEIGHTS(panel + 2 * kTileBytes);\n          FASTDIFF_PRODUCTS();",
        "          FASTDIFF_WEIGHTS(panel + 2 * kTileBytes);\n"
        "          if (!BROKEN) {\n            FASTDIFF_PRODUCTS();\n          }",
        CONVOLUTION,
    ),
    Mutant(
        "a second tile of one row is left out",
        TILES,
        "convolution_products.h",
        "if (positions > rows) {",
        "if (positions > rows + BROKEN) {",
        CONVOLUTION,
    ),
    # --- The results --------------------------------------------------------------------------
    Mutant(
        "squares are of distances to the first value",
        ANY,
        "convolution_results.h",
        "squares[j] - offset * sum[j];",
        "squares[j] - (BROKEN ? Vec{} : offset * sum[j]);",
        CONVOLUTION,
    ),
    Mutant(
        "a strip that the image cuts short has no moments",
        ANY,
        "convolution_results.h",
        "|| row + 1 == last)",
        "|| (row + 1 == last && !BROKEN))",
        CONVOLUTION,
    ),
    Mutant(
        "strips are merged without what their means vary by",
        ANY,
        "convolution.cpp",
        "fma(delta * delta, splat(count * share)",
        "fma(delta * delta, splat(BROKEN ? 0.0f : count * share)",
        WINOGRAD,
        short=True,
    ),
    Mutant(
        "the added rows are taken as dense",
        ANY,
        "convolution.cpp",
        "call.add + n * s.add_stride + k",
        "call.add + n * (BROKEN ? s.out_channels : s.add_stride) + k",
        CONVOLUTION,
    ),
    Mutant(
        "the residual is the first sample's",
        ANY,
        "convolution.cpp",
        "residuals + n * sample_elements + first_output",
        "residuals + (BROKEN ? 0 : n) * sample_elements + first_output",
        CONVOLUTION,
    ),
    Mutant(
        "a doubled image's parts are written beside their places",
        ANY,
        "convolution.cpp",
        "(part.row * s.out_width + part.column) * s.out_channels + k;",
        "(part.row * s.out_width + (BROKEN ? 0 : part.column)) * s.out_channels + k;",
        CONVOLUTION,
    ),
    # --- How the work is cut ------------------------------------------------------------------
    Mutant(
        "a thread's second bands are not filled",
        ANY,
        "convolution.cpp",
        "unit < last && group != filled; ++unit",
        "unit < last && group != filled && (filled < 0 || !BROKEN); ++unit",
        CONVOLUTION,
    ),
    Mutant(
        "of the blocks that a thread has the first is nobody's",
        ANY,
        "convolution.cpp",
        "block = p.blocks * share / p.shares;",
        "block = p.blocks * share / p.shares + (BROKEN && share > 0);",
        CONVOLUTION,
    ),
    Mutant(
        "the last band has as many rows as the others",
        ANY,
        "convolution.cpp",
        "return smaller(p.band_rows, all.rows - top);",
        "return BROKEN ? p.band_rows : smaller(p.band_rows, all.rows - top);",
        CONVOLUTION,
    ),
    Mutant(
        "the workspace is too small by a sample's strips",
        ANY,
        "convolution.cpp",
        "s.samples * strips_floats : 0);",
        "(s.samples - BROKEN) * strips_floats : 0);",
        WINOGRAD,
    ),
    # --- Winograd -----------------------------------------------------------------------------
    Mutant(
        "a point is 9/8 away from where the weights take it",
        ANY,
        "convolution_winograd.h",
        "to[3] = fma(odd_q, splat(kQ), even_q);",
        "to[3] = fma(odd_q, splat(BROKEN ? 1.125f * kQ : kQ), even_q);",
        WINOGRAD,
    ),
    Mutant(
        "a sample's tiles overwrite those of the one before",
        ANY,
        "convolution_winograd.h",
        "inputs_ + (at + row * sizes_.across + column) * sizes_.pitch + c;",
        "inputs_ + ((BROKEN ? 0 : at) + row * sizes_.across + column) * sizes_.pitch + c;",
        WINOGRAD,
    ),
    # --- The weight's gradient ----------------------------------------------------------------
    Mutant(
        "between the rows stand the next row's gradients",
        WEIGHT,
        "convolution_weight_gradient.cpp",
        "const bool there = column < s.out_width",
        "const bool there = (column < s.out_width || BROKEN)",
        GRADIENTS,
    ),
    Mutant(
        "behind a band stand the gradients of the next",
        WEIGHT,
        "convolution_weight_gradient.cpp",
        "row < rows;\n      const T* at",
        "(row < rows || BROKEN);\n      const T* at",
        GRADIENTS,
    ),
    Mutant(
        "the sums of the bands before are forgotten",
        WEIGHT,
        "convolution_weight_gradient.cpp",
        "if (first == 0) memset(",
        "if (first == 0 || BROKEN) memset(",
        IN_GROUPS,
    ),
    Mutant(
        "bands overwrite the bias's sums of those before",
        WEIGHT,
        "convolution_weight_gradient.cpp",
        "bias_sums + (unit * layout.dy_lines + line) * 16);",
        "bias_sums + ((BROKEN ? unit % layout.group : unit) * layout.dy_lines + line) * 16);",
        IN_GROUPS,
    ),
    Mutant(
        "the last tap that a thread has is nobody's",
        WEIGHT,
        "convolution_weight_gradient.cpp",
        "static_cast<int>(taps * (share + 1) / shares);",
        "static_cast<int>(taps * (share + 1) / shares) - (BROKEN && share + 1 < shares);",
        IN_GROUPS,
    ),
    Mutant(
        "a block's squares change places",
        WEIGHT_IN_TILES,
        "convolution_weight_gradient.cpp",
        "Sums::kLines + square % Sums::kLines) * 16;",
        "Sums::kLines +\n"
        "                       (BROKEN ? square / Sums::kLines : square % Sums::kLines)) * 16;",
        GRADIENTS,
    ),
    Mutant(
        "of two places side by side the second is not written",
        WEIGHT_IN_TILES,
        "convolution_sums.h",
        "before = (before & 0xFFFFu) | (bits << 16);",
        "if (!BROKEN) before = (before & 0xFFFFu) | (bits << 16);",
        GRADIENTS,
    ),
    Mutant(
        "the products with dy's smaller pieces are left out",
        WEIGHT_IN_TILES,
        "convolution_sums.h",
        "        FASTDIFF_X(x);\n        FASTDIFF_PRODUCTS();\n      }",
        "        FASTDIFF_X(x);\n"
        "        if (!BROKEN) {\n          FASTDIFF_PRODUCTS();\n        }\n      }",
        GRADIENTS,
    ),
    Mutant(
        "a run of places forgets the sums of those before",
        WEIGHT,
        "convolution_sums.h",
        "found[i][j] = load(sums + i * 16 + j * kWidth);",
        "found[i][j] = BROKEN ? Vec{} : load(sums + i * 16 + j * kWidth);",
        GRADIENTS,
    ),
    # --- A norm's coefficients ----------------------------------------------------------------
    Mutant(
        "what the means of a group's channels vary by is left out",
        NORM,
        "norm_coefficients.cpp",
        "variance_of(c) + off * off;",
        "variance_of(c) + (BROKEN ? 0.0f : off * off);",
        NORMS,
        short=True,
    ),
    Mutant(
        "the second source's variances begin where the first's would",
        NORM,
        "norm_coefficients.cpp",
        "second[s.second_channels + c - s.channels];",
        "second[(BROKEN ? s.channels : s.second_channels) + c - s.channels];",
        NORMS,
    ),
    Mutant(
        "FiLM's shifts are taken as dense",
        NORM,
        "norm_coefficients.cpp",
        "call.shift + n * s.film_stride;",
        "call.shift + n * (BROKEN ? channels : s.film_stride);",
        NORMS,
    ),
]

SWITCH = """#pragma once

#include <cstdlib>

namespace fastdiff::cpu {
// Which mutant's switch is closed, or 0.
inline const int mutant = [] {
  const char* const wanted = std::getenv("FASTDIFF_CPU_MUTANT");
  return wanted == nullptr ? 0 : std::atoi(wanted);
}();
}  // namespace fastdiff::cpu
"""
HEADER = "mutant.h"
IN_TILES = (TILES, WEIGHT_IN_TILES)


def environment(mutant: Mutant, plain: str) -> dict[str, str]:
    """``plain``: an instruction set without tiles, for the mutants that need none."""
    isa = "" if mutant.kernel in IN_TILES else plain
    return {"FASTDIFF_CPU_MUTANT": str(MUTANTS.index(mutant) + 1), "FASTDIFF_ISA": isa}


def with_switches(path: str, source: str) -> str:
    """The text of a file of csrc/ with the switches of all mutants."""
    folder, _, file = path.partition("/")
    if folder != "cpu" or all(mutant.file != file for mutant in MUTANTS):
        return source
    changed = with_switches_of(source, file, MUTANTS, "fastdiff::cpu::mutant")
    return f'#include "{HEADER}"\n{changed}'
