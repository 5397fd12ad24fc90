// Which instruction sets were compiled, which this CPU runs, and which one is in use.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace fastdiff::cpu {

std::vector<std::string> compiled_isas();   // slowest first
std::vector<std::string> supported_isas();  // those of them that this CPU and its OS can run

// Throws std::invalid_argument for a name that supported_isas() lacks. Meant to be called before
// any kernel runs; not synchronised with running ones.
void set_isa(const std::string& name);

std::string current_isa();
const Kernels& current_kernels();

}  // namespace fastdiff::cpu
