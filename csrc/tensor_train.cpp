// Rows of tensor-train tables (arXiv 2101.11714).
//
//   row(i)    G1[i1] G2[i2] .. Gd[id]              products from the left
//   forward   P_k = P_(k-1) G_k[i_k]               once per distinct prefix (i1 .. ik)
//
// Prefixes that end with one slice are laid side by side: together they are one product with that
// slice, (prefixes x columns) x rank x (columns of the slice), instead of many of a few rows each.
// The last core has few columns: its products run along the bond instead. One thread computes an
// element, in an order that depends on the ids alone.
//
// Source: TT-Rec (arXiv 2101.11714); reuse of leading products as in EL-Rec (SC 2022); grouping by
// slice: own.
#include <omp.h>

#include <utility>

#include "tensor_train_gradients.h"
#include "tensor_train_products.h"

namespace shardlab::SHARDLAB_ISA {
namespace {

// Columns of the last core for dimensions 16, 32 and 64.
constexpr int kFewColumns = 4;

void forward_level(const TensorTrain& train, const TrainIndex& index, const Products& products,
                   int64_t k) {
  const Level& level = index.levels[k];
  const int64_t inner = train.ranks[k], width = train.columns[k] * train.ranks[k + 1];
  const int64_t lead = leading_columns(train, k - 1), padded = round_up(width, kWidth);
#pragma omp for schedule(dynamic, 4)
  for (int64_t g = 0; g < level.num_groups(); ++g) {
    static thread_local Scratch parents, packed;
    const int64_t first = level.groups[g], end = level.groups[g + 1];
    const float* left = gather_parents(train, index, products, k, first, end, parents);
    const float* right = slice_of(train, k, level.digit[level.nodes[first]]);
    if (padded != width) {  // the last slice ends with the memory
      float* copy = packed.at_least(inner * padded);
      for (int64_t r = 0; r < inner; ++r)
        std::memcpy(copy + r * padded, right + r * width, width * sizeof(float));
      right = copy;
    }
    Ahead ahead = next_slice(train, index, k, g);
    float* target = products.data[k] + first * node_elements(train, k);
    if (g + 1 < level.num_groups()) {  // and its products' place
      ahead.write = products.data[k] + end * node_elements(train, k);
      ahead.write_end = products.data[k] + level.groups[g + 2] * node_elements(train, k);
    }
    multiply({left, inner, 1}, (end - first) * lead, inner, right, padded, width, target, width,
             ahead);
  }
}

// Of vectors whose segments of kSegment lanes belong to one sum each: the two halves of every
// segment added, those of x in the lower half of the segment and those of y in the upper.
template <int kSegment, int... kLane>
inline __attribute__((always_inline)) Wide halve(Wide x, Wide y,
                                                 std::integer_sequence<int, kLane...>) {
  constexpr int kHalf = kSegment / 2;
  const Wide kept = __builtin_shufflevector(
      x, y, (kLane % kSegment < kHalf ? kLane : kWidth + kLane)...);
  const Wide moved = __builtin_shufflevector(
      x, y, (kLane % kSegment < kHalf ? kLane + kHalf : kWidth + kLane - kHalf)...);
  return kept + moved;
}

// Lane i of the result is the sum of the lanes of sums[i], in a fixed order.
template <int kCount = kWidth>
inline __attribute__((always_inline)) Wide add_lanes(const Wide* sums) {
  if constexpr (kCount == 1) {
    return sums[0];
  } else {
    // sums[i] and sums[i + kCount / 2] meet in lanes that lie kCount / 2 apart.
    Wide halves[kCount / 2];
    for (int i = 0; i < kCount / 2; ++i)
      halves[i] = halve<kCount>(sums[i], sums[i + kCount / 2],
                                std::make_integer_sequence<int, kWidth>());
    return add_lanes<kCount / 2>(halves);
  }
}

// row[m * columns + j] = left[m] . slice[j], kWidth of them at a time, along the bond.
inline void last_product(const float* left, int64_t rows, const float* slice, int64_t columns,
                         int64_t rank, float* row) {
  const int64_t total = rows * columns;
  for (int64_t first = 0; first < total; first += kWidth) {
    const int64_t count = std::min<int64_t>(kWidth, total - first);
    const float *a[kWidth], *b[kWidth];
    int64_t m = first / columns, j = first % columns;
    for (int i = 0; i < kWidth; ++i) {
      a[i] = left + m * rank, b[i] = slice + j * rank;
      if (i + 1 < count && ++j == columns) j = 0, ++m;
    }
    Wide sums[kWidth] = {};
    for (int64_t r = 0; r < rank; r += kWidth) {
      const int64_t lanes = std::min<int64_t>(kWidth, rank - r);
      for (int i = 0; i < kWidth; ++i)
        sums[i] += wide_load_part(a[i] + r, lanes) * wide_load_part(b[i] + r, lanes);
    }
    wide_store_part(row + first, add_lanes(sums), count);
  }
}

// The same for slices of kColumns columns and ranks of whole vectors: every vector is loaded once.
template <int kColumns>
inline void last_product_of(const float* left, int64_t rows, const float* slice, int64_t rank,
                            float* row) {
  constexpr int kRows = kWidth / kColumns;
  for (int64_t m = 0; m < rows; m += kRows, left += kRows * rank, row += kWidth) {
    Wide sums[kWidth] = {};
    for (int64_t r = 0; r < rank; r += kWidth) {
      Wide right[kColumns];
      for (int j = 0; j < kColumns; ++j) right[j] = wide_load(slice + j * rank + r);
      for (int i = 0; i < kRows; ++i) {
        const Wide part = wide_load(left + i * rank + r);
        for (int j = 0; j < kColumns; ++j) sums[i * kColumns + j] += part * right[j];
      }
    }
    wide_store(row, add_lanes(sums));
  }
}

void rows_of_last(const TensorTrain& train, const TrainIndex& index, const Products& products,
                  float* out) {
  const int64_t k = train.cores - 1, rank = train.ranks[k], columns = train.columns[k];
  const int64_t lead = leading_columns(train, k - 1);
  const bool whole = rank % kWidth == 0 && lead * columns % kWidth == 0;
  const Level& level = index.levels[k];
#pragma omp for schedule(static)
  for (int64_t node = 0; node < level.size(); ++node) {
    const float* left = product_of(train, index, products, k - 1, level.parent[node]);
    const float* slice = slice_of(train, k, level.digit[node]);
    float* row = out + node * lead * columns;
    if (whole && columns == kFewColumns)
      last_product_of<kFewColumns>(left, lead, slice, rank, row);
    else
      last_product(left, lead, slice, columns, rank, row);
  }
}

void rows(const TensorTrain& train, const TrainIndex& index, float* buffer, float* out,
          int threads) {
  const Products products = place_products(train, index, buffer);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    for (int64_t k = 1; k + 1 < train.cores; ++k) forward_level(train, index, products, k);
    rows_of_last(train, index, products, out);
  }
}

}  // namespace

extern const TensorTrainKernels tensor_train_kernels{rows, gradients, step};

}  // namespace shardlab::SHARDLAB_ISA
