// DLRM's dot interaction: the inner products of every pair of a sample's vectors.
//
// A sample has N = F + 1 vectors of D fp32 elements: the output of the bottom MLP, then its F
// pooled embeddings, X[N, D]. Its output row is the bottom vector followed by the N (N - 1) / 2
// products <X[i], X[j]>, i < j, in row-major order of (i, j).
//
//   forward   bottom [B, D], pooled [B, F, D] -> out [B, D + N (N - 1) / 2]
//   backward  dX = (G + G^T) X per sample, with G the strict upper triangle of the gradients
//             of the products; the bottom vector also receives the gradient of its copy
//
// Source: Naumov et al., arXiv 1906.00091. All arrays are dense and row-major. Samples are
// independent, so any number of threads gives the same bits.
#pragma once
#include <cstdint>

namespace shardlab {

struct InteractionShape {
  int64_t batch, features, columns;  // B, F, D
};

struct InteractionKernels {
  void (*forward)(const InteractionShape& shape, const float* bottom, const float* pooled,
                  float* out, int threads);
  void (*backward)(const InteractionShape& shape, const float* grad, const float* bottom,
                   const float* pooled, float* grad_bottom, float* grad_pooled, int threads);
};

}  // namespace shardlab
