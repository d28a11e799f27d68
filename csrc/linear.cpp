// Products as in Goto & van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008):
// the right operand is packed into panels of kTileColumns columns that stay in the second-level
// cache, strips of kTileRows rows of the left one stay in the first-level cache, and a register
// tile runs over the two. The left operand is packed only where packing has work to do (the ReLU
// mask, the bias gradient, a transposition).
#include "linear.h"

#include <omp.h>

#include <algorithm>
#include <cstring>

#include "tile.h"

namespace shardlab::SHARDLAB_ISA {
namespace {

// Steps k and columns of the right operand that are packed at a time: a strip of the left operand
// is kTileRows x kDepth x 4 = 16 KiB, half a first-level cache; the packed panels are at most
// kDepth x kBreadth x 4 = 1 MiB. Half the depth for dw, whose left operand is packed as well.
constexpr int64_t kDepth = 512, kBreadth = 512;
// Columns of the gradient packed together for dw: four cache lines of every row that is touched.
constexpr int64_t kWideBlock = 8 * kTileRows;
// Rows of the gradient to prefetch ahead there; flat between 4 and 16.
constexpr int64_t kAhead = 8;

struct Range {
  int64_t begin, count;
};

// ---------------------------------------------------------------- right operand: panels
// Element (k, n) is data[k * row_stride + n * column_stride]; one of the strides is 1.
struct Right {
  const float* data;
  int64_t row_stride, column_stride;
};

// Panel p holds columns [p * kPanel, (p + 1) * kPanel) of `ns`: panel[k][j], zero beyond `ns`. The
// panels of a group are filled row by row, so that a page of the source is visited once.
constexpr int64_t kPanel = kTileColumns, kGroup = 8 * kPanel;

void pack_group(const Right& right, Range ks, Range ns, float* panels) {
  const float* from = right.data + ks.begin * right.row_stride + ns.begin * right.column_stride;
  const int64_t whole = ns.count / kPanel * kPanel, rest = ns.count - whole;
  if (rest) std::fill_n(panels + whole * ks.count, ks.count * kPanel, 0.f);
  if (right.column_stride == 1) {
    for (int64_t k = 0; k < ks.count; ++k, from += right.row_stride) {
      float* to = panels + k * kPanel;
      for (int64_t c = 0; c < whole; c += kPanel)
        std::memcpy(to + c * ks.count, from + c, kPanel * sizeof(float));
      if (rest) std::memcpy(to + whole * ks.count, from + whole, rest * sizeof(float));
    }
    return;
  }
  for (int64_t c = 0; c < ns.count; c += kPanel)
    transpose(from + c * right.column_stride, right.column_stride, std::min(kPanel, ns.count - c),
              ks.count, panels + c * ks.count, kPanel);
}

// ---------------------------------------------------------------- left operand: strips
// Each kind returns the tile operand of the strips of a block of kBlock rows, strip after strip
// `strip_stride` elements apart.
struct Strips {
  TileRows first;
  int64_t strip_stride;
};

// Rows of x as they are; a last, shorter strip is copied and filled up with zeros.
struct PlainRows {
  static constexpr int64_t kBlock = kTileRows, kSteps = kDepth;
  const float* data;
  int64_t stride;

  Strips strips(Range rows, Range ks, bool, float* scratch) const {
    const float* from = data + rows.begin * stride + ks.begin;
    if (rows.count == kTileRows) return {{from, stride, 1}, 0};
    std::fill_n(scratch, kTileRows * ks.count, 0.f);
    for (int64_t r = 0; r < rows.count; ++r)
      std::memcpy(scratch + r * ks.count, from + r * stride, ks.count * sizeof(float));
    return {{scratch, ks.count, 1}, 0};
  }
};

inline Wide masked(const float* grad, const float* out, int64_t n) {
  const Wide g = wide_load_part(grad, n);
  if (!out) return g;
  return wide_load_part(out, n) <= 0.f ? Wide{} : g;
}

// Rows of the masked gradient [B, N].
struct MaskedRows {
  static constexpr int64_t kBlock = kTileRows, kSteps = kDepth;
  const float *grad, *out;
  int64_t stride;

  Strips strips(Range rows, Range ks, bool, float* scratch) const {
    const int64_t width = round_up(ks.count, kWidth);
    if (rows.count < kTileRows) std::fill_n(scratch, kTileRows * width, 0.f);
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t start = (rows.begin + r) * stride + ks.begin;
      for (int64_t k = 0; k < ks.count; k += kWidth) {
        const int64_t n = std::min<int64_t>(kWidth, ks.count - k), at = start + k;
        wide_store(scratch + r * width + k, masked(grad + at, out ? out + at : nullptr, n));
      }
    }
    return {{scratch, width, 1}, 0};
  }
};

// Columns of the masked gradient as rows, with their sums over the batch on the way.
struct MaskedColumns {
  static constexpr int64_t kBlock = kWideBlock, kSteps = kDepth / 2;
  const float *grad, *out;
  int64_t stride;
  float* sums;  // or null

  Strips strips(Range rows, Range ks, bool first_pass, float* scratch) const {
    const int64_t strips = round_up(rows.count, kTileRows) / kTileRows;
    alignas(64) float line[kWideBlock + kWidth] = {}, total[kWideBlock + kWidth] = {};
    for (int64_t k = 0; k < ks.count; ++k) {
      const int64_t start = (ks.begin + k) * stride + rows.begin;
      for (int64_t c = 0; c < rows.count; c += kWidth) {
        const int64_t n = std::min<int64_t>(kWidth, rows.count - c), at = start + c;
        __builtin_prefetch(grad + at + kAhead * stride);
        if (out) __builtin_prefetch(out + at + kAhead * stride);
        const Wide g = masked(grad + at, out ? out + at : nullptr, n);
        wide_store(line + c, g);
        wide_store(total + c, wide_load(total + c) + g);
      }
      for (int64_t s = 0; s < strips; ++s)
        std::memcpy(scratch + (s * ks.count + k) * kTileRows, line + s * kTileRows,
                    kTileRows * sizeof(float));
    }
    if (sums && first_pass)
      for (int64_t c = 0; c < rows.count; ++c)
        sums[rows.begin + c] = total[c] + (ks.begin ? sums[rows.begin + c] : 0.f);
    return {{scratch, 1, kTileRows}, ks.count * kTileRows};
  }
};

// ---------------------------------------------------------------- product
struct Target {
  float* data;
  int64_t stride;
  const float* bias;
  bool relu;
};

// Stores a tile: what earlier steps left, the bias and the ReLU, each when asked for.
template <int R, int V>
inline void store_tile(const Wide (&sum)[R][V], const Target& target, Range rows, Range columns,
                       bool add, bool last) {
  for (int r = 0; r < rows.count; ++r) {
    float* to = target.data + (rows.begin + r) * target.stride + columns.begin;
    for (int v = 0; v < V; ++v) {
      const int64_t n = std::min<int64_t>(kWidth, columns.count - v * kWidth);
      if (n <= 0) break;
      Wide value = sum[r][v];
      if (add) value += wide_load_part(to + v * kWidth, n);
      if (last && target.bias) value += wide_load_part(target.bias + columns.begin + v * kWidth, n);
      if (last && target.relu) value = value < 0.f ? Wide{} : value;  // keeps a NaN
      wide_store_part(to + v * kWidth, value, n);
    }
  }
}

struct Extent {
  int64_t rows, columns, depth;
};

template <class Left>
void block_times_panels(const Left& left, Range rows, Range columns, Range ks, const float* panels,
                        const Target& target, int64_t depth, float* scratch) {
  const Strips strips = left.strips(rows, ks, columns.begin == 0, scratch);
  const bool add = ks.begin > 0, last = ks.begin + ks.count == depth;
  for (int64_t s = 0; s * kTileRows < rows.count; ++s) {
    TileRows a = strips.first;
    a.data += s * strips.strip_stride;
    const Range part{rows.begin + s * kTileRows,
                     std::min<int64_t>(kTileRows, rows.count - s * kTileRows)};
    for (int64_t c = 0; c < columns.count; c += kTileColumns) {
      Wide sum[kTileRows][kTileVecs];
      tile(ks.count, a, panels + c * ks.count, kTileColumns, sum);
      store_tile(sum, target, part,
                 {columns.begin + c, std::min<int64_t>(kTileColumns, columns.count - c)}, add,
                 last);
    }
  }
}

template <class Left>
void product(const Left& left, const Right& right, const Target& target, Extent extent,
             int threads) {
  static thread_local Scratch shared_panels;
  const int64_t depth = std::min(extent.depth, Left::kSteps);
  float* panels =
      shared_panels.at_least(depth * round_up(std::min(extent.columns, kBreadth), kTileColumns));
  const int64_t blocks = (extent.rows + Left::kBlock - 1) / Left::kBlock;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    static thread_local Scratch own_strips;
    float* strips = own_strips.at_least(Left::kBlock * round_up(depth, kWidth));
    for (int64_t n = 0; n < extent.columns; n += kBreadth)
      for (int64_t k = 0; k == 0 || k < extent.depth; k += Left::kSteps) {  // depth 0: zeros
        const Range columns{n, std::min(kBreadth, extent.columns - n)};
        const Range ks{k, std::min(Left::kSteps, extent.depth - k)};
#pragma omp for schedule(static)
        for (int64_t c = 0; c < columns.count; c += kGroup)
          pack_group(right, ks, {n + c, std::min(kGroup, columns.count - c)},
                     panels + c * ks.count);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; ++b)
          block_times_panels(
              left, {b * Left::kBlock, std::min(Left::kBlock, extent.rows - b * Left::kBlock)},
              columns, ks, panels, target, extent.depth, strips);
      }
  }
}

// ---------------------------------------------------------------- the layer
void forward(const LinearShape& s, const LinearForward& f, int threads) {
  product(PlainRows{f.x, f.x_stride}, Right{f.weight, 1, s.inputs},
          Target{f.out, s.outputs, f.bias, f.relu}, {s.batch, s.outputs, s.inputs}, threads);
}

void backward(const LinearShape& s, const LinearBackward& b, int threads) {
  if (b.grad_x)
    product(MaskedRows{b.grad, b.out, s.outputs}, Right{b.weight, s.inputs, 1},
            Target{b.grad_x, s.inputs, nullptr, false}, {s.batch, s.inputs, s.outputs}, threads);
  if (b.grad_weight)
    product(MaskedColumns{b.grad, b.out, s.outputs, b.grad_bias}, Right{b.x, b.x_stride, 1},
            Target{b.grad_weight, s.inputs, nullptr, false}, {s.outputs, s.inputs, s.batch},
            threads);
}

}  // namespace

extern const LinearKernels linear_kernels{forward, backward};

}  // namespace shardlab::SHARDLAB_ISA
