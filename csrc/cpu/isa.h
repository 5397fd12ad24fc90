// The CPU kernels are compiled once for each instruction set, in a namespace of its name, and called
// as those of the one in use. In an operation's header, within fastdiff::cpu,
//
//   FASTDIFF_KERNEL(normal, void(const NormalFill& fill, int threads));
//
// declares baseline::normal, avx2::normal and avx512::normal, as many as are compiled, and
// cpu::normal(fill, threads) calls one of them. The kernel's own source, where FASTDIFF_ISA names its
// namespace, defines that one alone.
#pragma once

#ifndef FASTDIFF_ISA
#include <string>
#include <vector>
#endif

namespace fastdiff::cpu {

template <typename Signature>
using Function = Signature;  // so that a declaration can spell one

#ifdef FASTDIFF_ISA

#define FASTDIFF_KERNEL(name, ...) \
  namespace FASTDIFF_ISA {         \
  Function<__VA_ARGS__> name;      \
  }

#else

#ifdef FASTDIFF_HAVE_AVX2
#define FASTDIFF_AVX2(...) __VA_ARGS__
#else
#define FASTDIFF_AVX2(...)
#endif
#ifdef FASTDIFF_HAVE_AVX512
#define FASTDIFF_AVX512(...) __VA_ARGS__
#else
#define FASTDIFF_AVX512(...)
#endif

constexpr int kIsas = 1 FASTDIFF_AVX2(+1) FASTDIFF_AVX512(+1);

inline int isa_in_use = 0;  // written by set_isa

// One kernel's functions, slowest first.
template <typename Signature>
struct Kernel;
template <typename Result, typename... Parameters>
struct Kernel<Result(Parameters...)> {
  Result (*of_isa[kIsas])(Parameters...);

  Result operator()(Parameters... arguments) const { return of_isa[isa_in_use](arguments...); }
};

#define FASTDIFF_KERNEL(name, ...)                                  \
  namespace baseline {                                              \
  Function<__VA_ARGS__> name;                                       \
  }                                                                 \
  FASTDIFF_AVX2(namespace avx2 { Function<__VA_ARGS__> name; })     \
  FASTDIFF_AVX512(namespace avx512 { Function<__VA_ARGS__> name; }) \
  inline constexpr Kernel<__VA_ARGS__> name = {                     \
      {baseline::name FASTDIFF_AVX2(, avx2::name) FASTDIFF_AVX512(, avx512::name)}}

std::vector<std::string> compiled_isas();   // slowest first
std::vector<std::string> supported_isas();  // those of them that this CPU and its OS can run

// Throws std::invalid_argument for a name that supported_isas() lacks. Meant to be called before
// any kernel runs; not synchronised with running ones.
void set_isa(const std::string& name);

std::string current_isa();

#endif

}  // namespace fastdiff::cpu
