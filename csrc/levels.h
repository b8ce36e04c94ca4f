#pragma once
#include <string>
#include <vector>

// Which instruction set runs: picked once by what the processor has.
namespace mmfast {

std::vector<std::string> isa_levels();  // those this machine can run, lowest first
std::string isa();                      // the one in use
// Switches; "" takes MMFAST_CPU_ISA or the highest. Throws std::invalid_argument for one that
// cannot run here.
void set_isa(const std::string& level);

}  // namespace mmfast
