// Matrix products as in Goto & van de Geijn, "Anatomy of High-Performance Matrix Multiplication"
// (2008): the right operand is packed into panels of kPanel columns that stay in the second-level
// cache, strips of kTileRows rows of the left one stay in the first-level cache, and a register
// tile runs over the two. The operands say how they are packed and the target how it is stored, so
// that masks, sums, biases and conversions ride along.
//
//   Left     kBlock: rows packed at a time; kSteps: most steps at a time; Multiply: of a tile
//            strips(rows, steps, first_pass, scratch) -> Strips
//   Right    pack(steps, columns, panels): panel after panel, [step][kPanel], zeros beyond the end
//   Target   store(sum, rows, columns, add, last): add to what earlier steps left; last: no more
//
// A step is one element of the inner dimension, or two for bf16. Elements of panels and strips are
// 32 bits wide. Every element of the target is summed by one thread in an order that depends on the
// shape alone.
#pragma once
#include <algorithm>

#include "tile.h"

namespace shardlab::SHARDLAB_ISA {

constexpr int64_t kPanel = kTileColumns;
// Panels packed together: a page of the source is visited once for all of them.
constexpr int64_t kGroup = 8 * kPanel;
// Steps and columns of the right operand that are packed at a time: a strip of the left operand is
// kTileRows x kDepth x 4 = 16 KiB, half a first-level cache; the panels are at most
// kDepth x kBreadth x 4 = 1 MiB.
constexpr int64_t kDepth = 512, kBreadth = 512;
// Columns of a gradient packed together as rows of a left operand: four cache lines of fp32 of
// every row that is touched, and the rows to prefetch ahead there (flat between 4 and 16).
constexpr int64_t kWideBlock = 8 * kTileRows, kAhead = 8;

struct Range {
  int64_t begin, count;
};

struct Extent {
  int64_t rows, columns, steps;
};

// Tile operands of the strips of a block, `strip_stride` elements apart.
struct Strips {
  TileRows first;
  int64_t strip_stride;
};

template <class Left, class Target>
void block_times_panels(const Left& left, Range rows, Range columns, Range ks, const float* panels,
                        const Target& target, int64_t steps, float* scratch) {
  const Strips strips = left.strips(rows, ks, columns.begin == 0, scratch);
  const bool add = ks.begin > 0, last = ks.begin + ks.count == steps;
  for (int64_t s = 0; s * kTileRows < rows.count; ++s) {
    TileRows a = strips.first;
    a.data += s * strips.strip_stride;
    const Range part{rows.begin + s * kTileRows,
                     std::min<int64_t>(kTileRows, rows.count - s * kTileRows)};
    for (int64_t c = 0; c < columns.count; c += kPanel) {
      Wide sum[kTileRows][kTileVecs];
      tile<typename Left::Multiply>(ks.count, a, panels + c * ks.count, kPanel, sum);
      target.store(sum, part, {columns.begin + c, std::min(kPanel, columns.count - c)}, add, last);
    }
  }
}

template <class Left, class Right, class Target>
void product(const Left& left, const Right& right, const Target& target, Extent extent,
             int threads) {
  static thread_local Scratch shared_panels;
  const int64_t depth = std::min(extent.steps, Left::kSteps);
  float* panels =
      shared_panels.at_least(depth * round_up(std::min(extent.columns, kBreadth), kPanel));
  const int64_t blocks = (extent.rows + Left::kBlock - 1) / Left::kBlock;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    static thread_local Scratch own_strips;
    float* strips = own_strips.at_least(Left::kBlock * round_up(depth, kWidth));
    for (int64_t n = 0; n < extent.columns; n += kBreadth)
      for (int64_t k = 0; k == 0 || k < extent.steps; k += Left::kSteps) {  // no steps: zeros
        const Range columns{n, std::min(kBreadth, extent.columns - n)};
        const Range ks{k, std::min(Left::kSteps, extent.steps - k)};
#pragma omp for schedule(static)
        for (int64_t c = 0; c < columns.count; c += kGroup)
          right.pack(ks, {n + c, std::min(kGroup, columns.count - c)}, panels + c * ks.count);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; ++b)
          block_times_panels(
              left, {b * Left::kBlock, std::min(Left::kBlock, extent.rows - b * Left::kBlock)},
              columns, ks, panels, target, extent.steps, strips);
      }
  }
}

}  // namespace shardlab::SHARDLAB_ISA
