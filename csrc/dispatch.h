#pragma once
#include <vector>

#include "kernels.h"

namespace shardlab {

// Widest first; the portable kernels are always last.
std::vector<const Kernels*> available_kernels();
// The widest, or the one that the environment variable SHARDLAB_ISA names when it can run here.
const Kernels& active_kernels();

}  // namespace shardlab
