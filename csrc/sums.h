// Weighted sums of rows in a fixed order, and the cut of uniques between threads: what pooling,
// sums of gradients and updates share.
#pragma once
#include "codec.h"

namespace shardlab::SHARDLAB_ISA {

constexpr int kBlockVecs = 8;  // accumulators of a column block

// sum[0..columns) = sum_k w_k * row(k), k in [begin, end), in order, in blocks of columns. row(k)
// is the address of a record of the Reader's codec, or null for none.
template <class Reader, int N, class Row, class Weight>
inline void sum_block(int64_t begin, int64_t end, int64_t columns, int64_t column, const Row& row,
                      const Weight& weight, Vec* sum) {
  for (int v = 0; v < N; ++v) sum[v] = Vec{};
  for (int64_t k = begin; k < end; ++k) {
    const char* record = row(k);
    if (!record) continue;
    const auto source = Reader::open(record, columns);
    const float w = weight(k);
    for (int v = 0; v < N; ++v) {
      const Vec value = Reader::load(source, column + v * kLanes);
      sum[v] += Weight::kUnit ? value : value * w;
    }
  }
}

template <class Reader, class Row, class Weight>
inline Vec sum_tail(int64_t begin, int64_t end, int64_t columns, int64_t column, const Row& row,
                    const Weight& weight) {
  Vec sum{};
  for (int64_t k = begin; k < end; ++k) {
    const char* record = row(k);
    if (!record) continue;
    const Vec part = Reader::load_part(Reader::open(record, columns), column, columns - column);
    sum += Weight::kUnit ? part : part * weight(k);
  }
  return sum;
}

// Calls write(column, vec, lanes) for every block of columns of the sum.
template <class Reader, class Row, class Weight, class Write>
inline void sum_rows(int64_t begin, int64_t end, int64_t columns, const Row& row,
                     const Weight& weight, const Write& write) {
  Vec sum[kBlockVecs];
  int64_t c = 0;
  auto emit = [&](int n) {
    for (int v = 0; v < n; ++v) write(c + v * kLanes, sum[v], kLanes);
    c += n * kLanes;
  };
  for (; c + 8 * kLanes <= columns;) {
    sum_block<Reader, 8>(begin, end, columns, c, row, weight, sum);
    emit(8);
  }
  if (c + 4 * kLanes <= columns) {
    sum_block<Reader, 4>(begin, end, columns, c, row, weight, sum);
    emit(4);
  }
  if (c + 2 * kLanes <= columns) {
    sum_block<Reader, 2>(begin, end, columns, c, row, weight, sum);
    emit(2);
  }
  if (c + kLanes <= columns) {
    sum_block<Reader, 1>(begin, end, columns, c, row, weight, sum);
    emit(1);
  }
  if (c < columns)
    write(c, sum_tail<Reader>(begin, end, columns, c, row, weight), columns - c);
}

// Rows ahead to prefetch. 390 ns of latency at about 20 ns a row; flat between 8 and 32.
constexpr int64_t kAhead = 16;

struct UnitWeight {
  static constexpr bool kUnit = true;
  float operator()(int64_t) const { return 1.0f; }
};
struct ArrayWeight {
  static constexpr bool kUnit = false;
  const float* weights;
  float operator()(int64_t k) const { return weights[k]; }
};

// Calls body(weight) with the weights of an array, or with ones where it is null.
template <class Body>
inline void with_weights(const float* weights, const Body& body) {
  if (weights)
    body(ArrayWeight{weights});
  else
    body(UnitWeight{});
}

// Uniques are cut so that every thread gets about the same number of entries and uniques.
inline int64_t cut(const int64_t* starts, int64_t count, int64_t part, int64_t parts) {
  const int64_t target = (starts[count] - starts[0] + count) * part / parts;
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (starts[middle] - starts[0] + middle < target)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

}  // namespace shardlab::SHARDLAB_ISA
