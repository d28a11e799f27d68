// Rows of unique ids, each read once in ascending order and copied to every place that asked for it.
#pragma once
#include <cstdint>

#include "rows.h"

namespace shardlab {

// Segment s of the uniques (ids[splits[s] .. splits[s + 1])) are rows of block s. Entry k of the CSR
// gets weights[k] * row, as fp32, at out + sources[k].
struct ScatterKernels {
  void (*scatter)(const Arena& arena, const int64_t* ids, const int64_t* splits, const Csr& csr,
                  float* out, int threads);
};

}  // namespace shardlab
