// Rows of tensor-train tables and the gradients of their cores.
#pragma once
#include <cstdint>

#include "rows.h"

namespace shardlab {

constexpr int kMaxCores = 4;

// Core k holds rows[k] slices. A slice is [ranks[k]][columns[k]][ranks[k + 1]], of the last core
// [columns][ranks[k]]: the bond is then always contiguous. The first and last rank are 1.
struct TensorTrain {
  int64_t cores;
  int64_t rows[kMaxCores], columns[kMaxCores], ranks[kMaxCores + 1];
  const float* data[kMaxCores];
};

struct TrainIndex;

// How the slices of a core are stepped: as rows of a block. Gradients are scaled and clipped already.
struct CoreStep {
  Arena arena;
  int64_t block;
  Rule rule;
  Step step;
  uint64_t key;  // of the random bits
};

// The index is that of ids which ascend and differ, at least one. `products` keeps the products of
// the leading cores for every distinct prefix: rows() fills it, gradients() reads it; room as
// product_elements() says.
struct TensorTrainKernels {
  // out[ids][product of columns]
  void (*rows)(const TensorTrain& train, const TrainIndex& index, float* products, float* out,
               int threads);
  // Of every core k the gradients of the slices that the ids meet, into grads[k]: slice after slice,
  // or, where `every` is set, each at its place among all slices of the core.
  void (*gradients)(const TensorTrain& train, const TrainIndex& index, const float* products,
                    const float* row_grads, bool every, float* const* grads, int threads);
  // The same gradients, each given to the optimiser as soon as it is known: a slice is in the
  // caches then, and its gradient never leaves them. `every` also steps slices that no id meets.
  void (*step)(const TensorTrain& train, const TrainIndex& index, const float* products,
               const float* row_grads, bool every, const CoreStep* cores, int threads);
};

}  // namespace shardlab
