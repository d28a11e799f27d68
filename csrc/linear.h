// A fully connected layer with an optional ReLU, forward and backward, in fp32.
//
//   forward   out[B, N] = act(x[B, K] w[N, K]^T + bias[N])
//   backward  g'[B, N] = g where out > 0, else 0 (g itself without ReLU)
//             dx[B, K] = g' w      dw[N, K] = g'^T x      dbias[N] = column sums of g'
//
// The bias, the ReLU and its mask ride in the packing and the storing of the products: no pass over
// the activations of their own, no masked copy of the gradient. Every element is summed by one
// thread in an order that depends on the shape alone, so any number of threads gives the same bits.
// Matrices are row-major; leading dimensions (distance between rows, in elements) are given where
// they may differ from the width.
#pragma once
#include <cstdint>

// Whether linear_bf16.cpp has anything to offer: it needs GCC's way to allow one file an extension.
#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
#define SHARDLAB_BF16_PRODUCTS
#endif

namespace shardlab {

struct LinearShape {
  int64_t batch, inputs, outputs;  // B, K >= 1, N
};

struct LinearForward {
  const float* x;
  int64_t x_stride;
  const float* weight;
  const float* bias;  // or null
  float* out;
  bool relu;
};

struct LinearBackward {
  const float* grad;  // [B, N]
  const float* out;   // [B, N], the layer's output after ReLU; null when there was no ReLU
  const float* x;
  int64_t x_stride;
  const float* weight;
  float* grad_x;       // [B, K], or null: not wanted
  float* grad_weight;  // [N, K], or null: neither it nor grad_bias is wanted
  float* grad_bias;    // [N], or null
};

// The same layer in bf16: products of bf16 rounded operands, summed in fp32. Weight, bias and their
// gradients are fp32; out and grad are bf16; x and grad_x are bf16 or fp32. Rounding happens where
// operands are packed and results stored: no converted copy exists.
struct LinearForwardBf16 {
  const void* x;
  bool x_is_bf16;
  int64_t x_stride;
  const float* weight;
  const float* bias;  // or null
  uint16_t* out;
  bool relu;
};

struct LinearBackwardBf16 {
  const uint16_t* grad;
  const uint16_t* out;  // null when there was no ReLU
  const void* x;
  bool x_is_bf16;
  int64_t x_stride;
  const float* weight;
  void* grad_x;        // or null: not wanted
  float* grad_weight;  // or null: neither it nor grad_bias is wanted
  float* grad_bias;    // or null
};

struct LinearKernels {
  void (*forward)(const LinearShape& shape, const LinearForward& f, int threads);
  void (*backward)(const LinearShape& shape, const LinearBackward& b, int threads);
  // Null where this instruction set has no bf16 products; the processor must have avx512bf16, too.
  void (*forward_bf16)(const LinearShape& shape, const LinearForwardBf16& f, int threads);
  void (*backward_bf16)(const LinearShape& shape, const LinearBackwardBf16& b, int threads);
};

}  // namespace shardlab
