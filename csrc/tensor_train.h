// Rows of tensor-train tables and the gradients of their cores.
#pragma once
#include <cstdint>

namespace shardlab {

constexpr int kMaxCores = 4;

// Core k holds rows[k] slices. A slice is [ranks[k]][columns[k]][ranks[k + 1]], of the last core
// [columns][ranks[k]]: the bond is then always contiguous. The first and last rank are 1.
struct TensorTrain {
  int64_t cores;
  int64_t rows[kMaxCores], columns[kMaxCores], ranks[kMaxCores + 1];
  const float* data[kMaxCores];
};

// Ids ascend and differ. `products` keeps the products of the leading cores for every distinct
// prefix: rows() fills it, gradients() reads it; room as product_elements() says.
struct TensorTrainKernels {
  // out[n][product of columns]
  void (*rows)(const TensorTrain& train, const int64_t* ids, int64_t n, float* products, float* out,
               int threads);
  // Of every core k: the slices that the ids touch, ascending, into touched[k] (room for
  // min(n, rows[k])), their gradients, slice after slice, into grads[k], how many into counts[k].
  void (*gradients)(const TensorTrain& train, const int64_t* ids, int64_t n, const float* products,
                    const float* row_grads, int64_t* const* touched, float* const* grads,
                    int64_t* counts, int threads);
};

}  // namespace shardlab
