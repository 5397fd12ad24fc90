#include "isa.h"

#include <stdexcept>

namespace fastdiff::cpu {
namespace {

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool (*runs_here)();
};

// __builtin_cpu_supports also asks xgetbv whether the OS saves the wide registers.
const Isa kIsas[] = {
    {"baseline", &baseline::kernels, [] { return true; }},
#ifdef FASTDIFF_HAVE_AVX2
    {"avx2", &avx2::kernels,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
     }},
#endif
#ifdef FASTDIFF_HAVE_AVX512
    {"avx512", &avx512::kernels,
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

const Isa* current = &kIsas[0];

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas) names.push_back(isa.name);
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas) {
    if (isa.runs_here()) names.push_back(isa.name);
  }
  return names;
}

void set_isa(const std::string& name) {
  for (const Isa& isa : kIsas) {
    if (name == isa.name && isa.runs_here()) {
      current = &isa;
      return;
    }
  }
  throw std::invalid_argument("instruction set '" + name + "' cannot run here");
}

std::string current_isa() { return current->name; }

const Kernels& current_kernels() { return *current->kernels; }

}  // namespace fastdiff::cpu
