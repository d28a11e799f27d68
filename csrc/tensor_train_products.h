// Products of leading cores and the small matrix products over them: what rows and gradients share.
#pragma once
#include "tensor_train_index.h"
#include "tile.h"

namespace shardlab::SHARDLAB_ISA {

// Rows of a strip at most: with two vectors of sums each they fill 24 of 32 registers, or 12 of 16.
constexpr int kStripRows = kTileVecs == 1 ? 12 : 6;

constexpr int64_t kLineElements = 64 / sizeof(float);

struct Products {
  float* data[kMaxCores];
};

inline Products place_products(const TensorTrain& train, const TrainIndex& index, float* buffer) {
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

// Memory that is wanted soon: some lines are asked for at every step of a product. All at once they
// would fill the queue of outstanding lines, and the product would wait behind it.
struct Ahead {
  const float *next = nullptr, *end = nullptr;
  float *write = nullptr, *write_end = nullptr;

  __attribute__((always_inline)) void operator()() {
    if (next < end) {
      __builtin_prefetch(next);
      next += kLineElements;
    }
    if (write < write_end) {
      __builtin_prefetch(write, 1);
      write += kLineElements;
    }
  }
};

// The slice of the group after `group`: cores do not stay in the caches between steps.
inline Ahead next_slice(const TensorTrain& train, const TrainIndex& index, int64_t k,
                        int64_t group) {
  if (group + 1 >= index.levels[k].num_groups()) return {};
  const float* slice = slice_of(train, k, index.digit_of_group(k, group + 1));
  return {slice, slice + slice_elements(train, k)};
}

// A strip of a product: kRows rows, of which the last is dropped where `whole` is false, and up to
// kVecs vectors of columns.
template <int kRows, int kVecs>
inline __attribute__((always_inline)) void strip(TileRows left, int64_t steps, const float* right,
                                                 int64_t right_stride, int64_t columns,
                                                 float* target, int64_t target_stride,
                                                 bool whole, Ahead& ahead) {
  Wide sum[kRows][kVecs];
  tile<MultiplyAdd>(steps, left, right, right_stride, sum, ahead);
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
            int64_t columns, float* target, int64_t target_stride, bool whole, Ahead& ahead) {
  int64_t c = 0;
  for (; c + kWidth < columns; c += 2 * kWidth)
    strip<kRows, 2>(left, steps, right + c, right_stride, columns - c, target + c, target_stride,
                    whole, ahead);
  if (c < columns)
    strip<kRows, 1>(left, steps, right + c, right_stride, columns - c, target + c, target_stride,
                    whole, ahead);
}

// target[rows][columns] = left x right: element (r, s) of left is left.data[r * row_stride +
// s * step], rows of right lie right_stride apart. Groups have few rows, often 4 to 12: strips are
// as even as they can be, and of an even number of rows. Up to one row and kWidth - 1 columns
// beyond the end are read, and dropped.
inline void multiply(TileRows left, int64_t rows, int64_t steps, const float* right,
                     int64_t right_stride, int64_t columns, float* target, int64_t target_stride,
                     Ahead& ahead) {
  for (int64_t count = (rows + kStripRows - 1) / kStripRows; count > 0; --count) {
    const int64_t inside = std::min(rows, round_up((rows + count - 1) / count, 2));
    const auto run = [&](auto run_strips) {
      run_strips(left, steps, right, right_stride, columns, target, target_stride,
                 inside % 2 == 0, ahead);
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
inline const float* gather_parents(const TensorTrain& train, const TrainIndex& index,
                                   const Products& products, int64_t k, int64_t first,
                                   int64_t end, Scratch& scratch) {
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

}  // namespace shardlab::SHARDLAB_ISA
