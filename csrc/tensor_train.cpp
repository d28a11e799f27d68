// Rows of tensor-train tables, and exact gradients of their cores (arXiv 2101.11714).
//
//   row(i)    G1[i1] G2[i2] .. Gd[id]              products from the left
//   forward   P_k = P_(k-1) G_k[i_k]               once per distinct prefix (i1 .. ik)
//   backward  dG_k[i] = sum P_(k-1)^T dP_k         over the prefixes that end with slice i
//             dP_(k-1) = sum dP_k G_k[i_k]^T       over the prefixes that go on from it
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

#include "tensor_train_index.h"
#include "tile.h"

namespace shardlab::SHARDLAB_ISA {
namespace {

// Rows of the last product that are computed together: each loads a lane of the slice once.
constexpr int kRowsTogether = 8;
// Rows of a strip at most: with two vectors of sums each they fill 24 of 32 registers, or 12 of 16.
constexpr int kStripRows = kTileVecs == 1 ? 12 : 6;

// Columns of the last core for dimensions 16, 32 and 64.
constexpr int kFewColumns = 4;

struct Products {
  float* data[kMaxCores];
};

Products place_products(const TensorTrain& train, const TrainIndex& index, float* buffer) {
  Products products{};
  for (int64_t k = 1; k + 1 < train.cores; ++k) {
    products.data[k] = buffer;
    buffer += (index.levels[k].size() + kSlackRows) * node_elements(train, k) + kSlack;
  }
  return products;
}

// The product of a node of level k, [leading columns][rank].
inline const float* product_of(const TensorTrain& train, const TrainIndex& index,
                               const Products& products, int64_t k, int64_t node) {
  if (k == 0) return train.data[0] + index.levels[0].digit[node] * slice_elements(train, 0);
  return products.data[k] + index.levels[k].slot[node] * node_elements(train, k);
}

inline const float* slice_of(const TensorTrain& train, int64_t k, int64_t digit) {
  return train.data[k] + digit * slice_elements(train, k);
}

// A strip of a product: kRows rows, of which the last is dropped where `whole` is false, and up to
// kVecs vectors of columns.
template <int kRows, int kVecs>
inline __attribute__((always_inline)) void strip(TileRows left, int64_t steps, const float* right,
                                                 int64_t right_stride, int64_t columns,
                                                 float* target, int64_t target_stride,
                                                 bool whole) {
  Wide sum[kRows][kVecs];
  tile<MultiplyAdd>(steps, left, right, right_stride, sum);
  // Sums stay in registers as long as no loop counts which of them to store.
  const int64_t last = columns - (kVecs - 1) * kWidth;
  const auto store = [&](int i) __attribute__((always_inline)) {
    float* row = target + i * target_stride;
    for (int v = 0; v + 1 < kVecs; ++v) wide_store(row + v * kWidth, sum[i][v]);
    if (last >= kWidth)
      wide_store(row + (kVecs - 1) * kWidth, sum[i][kVecs - 1]);
    else
      wide_store_part(row + (kVecs - 1) * kWidth, sum[i][kVecs - 1], last);
  };
  for (int i = 0; i + 1 < kRows; ++i) store(i);
  if (whole) store(kRows - 1);
}

template <int kRows>
void strips(TileRows left, int64_t steps, const float* right, int64_t right_stride,
            int64_t columns, float* target, int64_t target_stride, bool whole) {
  int64_t c = 0;
  for (; c + kWidth < columns; c += 2 * kWidth)
    strip<kRows, 2>(left, steps, right + c, right_stride, columns - c, target + c, target_stride,
                    whole);
  if (c < columns)
    strip<kRows, 1>(left, steps, right + c, right_stride, columns - c, target + c, target_stride,
                    whole);
}

// target[rows][columns] = left x right: element (r, s) of left is left.data[r * row_stride +
// s * step], rows of right lie right_stride apart. Groups have few rows, often 4 to 12: strips are
// as even as they can be, and of an even number of rows. Up to one row and kWidth - 1 columns
// beyond the end are read, and dropped.
inline void multiply(TileRows left, int64_t rows, int64_t steps, const float* right,
                     int64_t right_stride, int64_t columns, float* target, int64_t target_stride) {
  for (int64_t count = (rows + kStripRows - 1) / kStripRows; count > 0; --count) {
    const int64_t inside = std::min(rows, round_up((rows + count - 1) / count, 2));
    const auto run = [&](auto run_strips) {
      run_strips(left, steps, right, right_stride, columns, target, target_stride,
                 inside % 2 == 0);
    };
    switch ((inside + 1) / 2) {
      case 1: run(strips<2>); break;
      case 2: run(strips<4>); break;
      case 3: run(strips<6>); break;
      case 4: run(strips<std::min(8, kStripRows)>); break;
      case 5: run(strips<std::min(10, kStripRows)>); break;
      default: run(strips<kStripRows>);
    }
    rows -= inside;
    left.data += inside * left.row_stride, target += inside * target_stride;
  }
}

// The products of the nodes' parents, one below the other: what all nodes of a group multiply.
const float* gather_parents(const TensorTrain& train, const TrainIndex& index,
                            const Products& products, int64_t k, int64_t first, int64_t end,
                            Scratch& scratch) {
  const int64_t elements = node_elements(train, k - 1);
  float* rows = scratch.at_least((end - first) * elements + train.ranks[k] + kSlack);
  for (int64_t place = first; place < end; ++place) {
    const int64_t node = index.levels[k].nodes[place];
    std::memcpy(rows + (place - first) * elements,
                product_of(train, index, products, k - 1, index.levels[k].parent[node]),
                elements * sizeof(float));
  }
  std::fill_n(rows + (end - first) * elements, train.ranks[k], 0.f);
  return rows;
}

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
    multiply({left, inner, 1}, (end - first) * lead, inner, right, padded, width,
             products.data[k] + first * node_elements(train, k), width);
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

// ---------------------------------------------------------------- gradients

// target[i][r] = sum over terms t of weight(t, i) * vector(t)[r], i < count <= kRowsTogether.
// `walk(visit)` calls visit(vector, weights, weight_step) for every term in order.
template <int kCount, class Walk>
inline __attribute__((always_inline)) void combine(int64_t rank, const Walk& walk, float* target) {
  for (int64_t r = 0; r < rank; r += kWidth) {
    const int64_t lanes = std::min<int64_t>(kWidth, rank - r);
    Wide sum[kCount] = {};
    walk([&](const float* vector, const float* weights, int64_t step) __attribute__((
             always_inline)) {
      const Wide value = wide_load_part(vector + r, lanes);
      for (int i = 0; i < kCount; ++i) sum[i] = sum[i] + weights[i * step] * value;
    });
    for (int i = 0; i < kCount; ++i) wide_store_part(target + i * rank + r, sum[i], lanes);
  }
}

template <class MakeWalk>
inline void combine_rows(int64_t count, int64_t rank, const MakeWalk& walk_from, float* target) {
  int64_t i = 0;
  for (; i + kRowsTogether <= count; i += kRowsTogether)
    combine<kRowsTogether>(rank, walk_from(i), target + i * rank);
  for (; i + 4 <= count; i += 4) combine<4>(rank, walk_from(i), target + i * rank);
  for (; i + 2 <= count; i += 2) combine<2>(rank, walk_from(i), target + i * rank);
  for (; i < count; ++i) combine<1>(rank, walk_from(i), target + i * rank);
}

struct Backward {
  const TensorTrain& train;
  const TrainIndex& index;
  Products products, grads;        // P_k, and dP_k in the same order
  float* before[kMaxCores];        // dP_(k-1) of every node of level k, before it is summed
  const float* row_grads;
  bool every;

  // Where the gradient of the first core's slice of a node goes.
  float* first_slice(float* const* core_grads, int64_t node) const {
    const Level& level = index.levels[0];
    return core_grads[0] + (every ? level.digit[node] : node) * node_elements(train, 0);
  }
};

// dP of the prefixes before the last digit: a row's gradient times its slice, over the ids.
void last_prefixes(const Backward& b, float* const* core_grads) {
  const int64_t k = b.train.cores - 1, rank = b.train.ranks[k], columns = b.train.columns[k];
  const int64_t lead = leading_columns(b.train, k - 1), width = lead * columns;
  const Level &level = b.index.levels[k], &above = b.index.levels[k - 1];
#pragma omp for schedule(dynamic, 32)
  for (int64_t node = 0; node < above.size(); ++node) {
    float* target = k == 1 ? b.first_slice(core_grads, node)
                           : b.grads.data[k - 1] + above.slot[node] * lead * rank;
    const int64_t first = above.children[node], end = above.children[node + 1];
    combine_rows(lead, rank, [&](int64_t m) {
      return [&, m](const auto& visit) __attribute__((always_inline)) {
        for (int64_t child = first; child < end; ++child) {
          const float* slice = slice_of(b.train, k, level.digit[child]);
          const float* weights = b.row_grads + child * width + m * columns;
          for (int64_t j = 0; j < columns; ++j) visit(slice + j * rank, weights + j, columns);
        }
      };
    }, target);
  }
}

// Gradients of the slices of the last core.
void last_slices(const Backward& b, float* core_grad) {
  const int64_t k = b.train.cores - 1, rank = b.train.ranks[k], columns = b.train.columns[k];
  const int64_t lead = leading_columns(b.train, k - 1), width = lead * columns;
  const Level& level = b.index.levels[k];
#pragma omp for schedule(dynamic, 4)
  for (int64_t g = 0; g < level.num_groups(); ++g) {
    const int64_t first = level.groups[g], end = level.groups[g + 1];
    combine_rows(columns, rank, [&](int64_t j) {
      return [&, j](const auto& visit) __attribute__((always_inline)) {
        for (int64_t place = first; place < end; ++place) {
          const int64_t node = level.nodes[place];
          const float* left = product_of(b.train, b.index, b.products, k - 1, level.parent[node]);
          const float* weights = b.row_grads + node * width + j;
          for (int64_t m = 0; m < lead; ++m) visit(left + m * rank, weights + m * columns, 1);
        }
      };
    }, core_grad + b.index.place_of_group(k, g, b.every) * columns * rank);
  }
}

// Of a level between: gradients of its slices, and what its nodes give to their parents.
void middle_level(const Backward& b, int64_t k, float* core_grad) {
  const Level& level = b.index.levels[k];
  const int64_t inner = b.train.ranks[k], width = b.train.columns[k] * b.train.ranks[k + 1];
  const int64_t lead = leading_columns(b.train, k - 1), panel = round_up(inner, kWidth);
#pragma omp for schedule(dynamic, 4)
  for (int64_t g = 0; g < level.num_groups(); ++g) {
    static thread_local Scratch parents, turned;
    const int64_t first = level.groups[g], end = level.groups[g + 1], rows = (end - first) * lead;
    const float* grad = b.grads.data[k] + first * lead * width;
    const float* left = gather_parents(b.train, b.index, b.products, k, first, end, parents);
    multiply({left, 1, inner}, inner, rows, grad, width, width,
             core_grad + b.index.place_of_group(k, g, b.every) * inner * width, width);
    float* slice = turned.at_least(width * panel);
    transpose(slice_of(b.train, k, level.digit[level.nodes[first]]), width, inner, width, slice,
              panel);
    multiply({grad, width, 1}, rows, width, slice, panel, inner,
             b.before[k] + first * lead * inner, inner);
  }
}

// dP_(k-1): what the nodes of level k give, summed over those with the same parent.
void sum_children(const Backward& b, int64_t k, float* const* core_grads) {
  const Level &level = b.index.levels[k], &above = b.index.levels[k - 1];
  const int64_t elements = node_elements(b.train, k - 1);
#pragma omp for schedule(static)
  for (int64_t node = 0; node < above.size(); ++node) {
    float* sum = k == 1 ? b.first_slice(core_grads, node)
                        : b.grads.data[k - 1] + above.slot[node] * elements;
    std::fill_n(sum, elements, 0.f);
    for (int64_t child = above.children[node]; child < above.children[node + 1]; ++child) {
      const float* part = b.before[k] + level.slot[child] * elements;
      for (int64_t e = 0; e < elements; ++e) sum[e] += part[e];
    }
  }
}

void gradients(const TensorTrain& train, const TrainIndex& index, const float* products,
               const float* row_grads, bool every, float* const* core_grads, int threads) {
  static thread_local Scratch grads, before[kMaxCores];
  Backward b{train, index, place_products(train, index, const_cast<float*>(products)), {}, {},
             row_grads, every};
  const int64_t last = train.cores - 1;
  b.grads = place_products(train, index,
                           grads.at_least(product_elements(train, index.levels[last].size())));
  for (int64_t k = 1; k < last; ++k)
    b.before[k] = before[k].at_least(index.levels[k].size() * node_elements(train, k - 1));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    last_prefixes(b, core_grads);
    last_slices(b, core_grads[last]);
    for (int64_t k = last - 1; k > 0; --k) {
      middle_level(b, k, core_grads[k]);
      sum_children(b, k, core_grads);
    }
  }
}

}  // namespace

extern const TensorTrainKernels tensor_train_kernels{rows, gradients};

}  // namespace shardlab::SHARDLAB_ISA
