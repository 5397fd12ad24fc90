#include "isa.h"

#include <iterator>
#include <stdexcept>

namespace fastdiff::cpu {
namespace {

struct Isa {
  const char* name;
  bool (*runs_here)();
};

// __builtin_cpu_supports also asks xgetbv whether the OS saves the wide registers.
const Isa kTable[] = {
    {"baseline", [] { return true; }},
#ifdef FASTDIFF_HAVE_AVX2
    {"avx2",
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
     }},
#endif
#ifdef FASTDIFF_HAVE_AVX512
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
#ifdef FASTDIFF_HAVE_AVX512_BF16
              && __builtin_cpu_supports("avx512bf16")
#endif
           ;
     }},
#endif
};

static_assert(std::size(kTable) == kIsas,
              "a row to each instruction set, as FASTDIFF_KERNEL has them");

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kTable) names.push_back(isa.name);
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kTable) {
    if (isa.runs_here()) names.push_back(isa.name);
  }
  return names;
}

void set_isa(const std::string& name) {
  for (int i = 0; i < kIsas; ++i) {
    if (name == kTable[i].name && kTable[i].runs_here()) {
      isa_in_use = i;
      return;
    }
  }
  throw std::invalid_argument("instruction set '" + name + "' cannot run here");
}

std::string current_isa() { return kTable[isa_in_use].name; }

}  // namespace fastdiff::cpu
