// The fp32 operands of the layer's three products; see product.h. The left operand is packed only
// where packing has work to do: the ReLU mask, the bias gradient, a transposition.
#include "linear.h"

#include <algorithm>
#include <cstring>

#include "narrow.h"
#include "product.h"

namespace shardlab::SHARDLAB_ISA {
namespace {

// ---------------------------------------------------------------- right operands
// Rows of a row-major matrix as steps.
struct RowsAsSteps {
  const float* data;
  int64_t stride;

  void pack(Range ks, Range ns, float* panels) const {
    const float* from = data + ks.begin * stride + ns.begin;
    const int64_t whole = ns.count / kPanel * kPanel, rest = ns.count - whole;
    if (rest) std::fill_n(panels + whole * ks.count, ks.count * kPanel, 0.f);
    for (int64_t k = 0; k < ks.count; ++k, from += stride) {
      float* to = panels + k * kPanel;
      for (int64_t c = 0; c < whole; c += kPanel)
        std::memcpy(to + c * ks.count, from + c, kPanel * sizeof(float));
      if (rest) std::memcpy(to + whole * ks.count, from + whole, rest * sizeof(float));
    }
  }
};

// Columns of a row-major matrix as steps.
struct ColumnsAsSteps {
  const float* data;
  int64_t stride;

  void pack(Range ks, Range ns, float* panels) const {
    for (int64_t c = 0; c < ns.count; c += kPanel) {
      float* panel = panels + c * ks.count;
      const int64_t width = std::min(kPanel, ns.count - c);
      if (width < kPanel) std::fill_n(panel, ks.count * kPanel, 0.f);
      transpose(data + (ns.begin + c) * stride + ks.begin, stride, width, ks.count, panel, kPanel);
    }
  }
};

// ---------------------------------------------------------------- left operands
// Rows of x as they are; a last, shorter strip is copied and filled up with zeros.
struct PlainRows {
  using Multiply = MultiplyAdd;
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
  using Multiply = MultiplyAdd;
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

// Columns of the masked gradient as rows, with their sums over the batch on the way. Half the
// depth: the packed block shares the second-level cache with the panels.
struct MaskedColumns {
  using Multiply = MultiplyAdd;
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

// ---------------------------------------------------------------- target
struct RowMajor {
  float* data;
  int64_t stride;
  const float* bias;
  bool relu;

  template <int R, int V>
  void store(const Wide (&sum)[R][V], Range rows, Range columns, bool add, bool last) const {
    for (int r = 0; r < rows.count; ++r) {
      float* to = data + (rows.begin + r) * stride + columns.begin;
      for (int v = 0; v < V; ++v) {
        const int64_t n = std::min<int64_t>(kWidth, columns.count - v * kWidth);
        if (n <= 0) break;
        Wide value = sum[r][v];
        if (add) value += wide_load_part(to + v * kWidth, n);
        if (last && bias) value += wide_load_part(bias + columns.begin + v * kWidth, n);
        if (last && relu) value = value < 0.f ? Wide{} : value;  // keeps a NaN
        wide_store_part(to + v * kWidth, value, n);
      }
    }
  }
};

// ---------------------------------------------------------------- the layer
struct Fp32Io {
  using X = float;
  using Y = float;
  static Wide load(const float* p, int64_t n) { return wide_load_part(p, n); }
  static void store(float* p, Wide v, int64_t n) { wide_store_part(p, v, n); }
  static float get(float y) { return y; }
  static void put(float* to, float value) { *to = value; }
  static Wide weight(Wide w) { return w; }
};

void narrow_backward(const LinearShape& s, const LinearBackward& b, int threads) {
  if (b.grad_x) narrow_grad_x<Fp32Io>(s, b.grad, b.out, b.weight, b.grad_x, threads);
  if (b.grad_weight)
    narrow_grad_weight<Fp32Io>(s, b.grad, b.out, b.x, b.x_stride, b.grad_weight, threads);
  if (b.grad_bias) narrow_grad_bias<Fp32Io>(s, b.grad, b.out, b.grad_bias);
}

void forward(const LinearShape& s, const LinearForward& f, int threads) {
  if (s.outputs < kNarrowOutputs)
    return narrow_forward<Fp32Io>(s, f.x, f.x_stride, f.weight, f.bias, f.out, f.relu, threads);
  product(PlainRows{f.x, f.x_stride}, ColumnsAsSteps{f.weight, s.inputs},
          RowMajor{f.out, s.outputs, f.bias, f.relu}, {s.batch, s.outputs, s.inputs}, threads);
}

void backward(const LinearShape& s, const LinearBackward& b, int threads) {
  if (s.outputs < kNarrowOutputs) return narrow_backward(s, b, threads);
  if (b.grad_x)
    product(MaskedRows{b.grad, b.out, s.outputs}, RowsAsSteps{b.weight, s.inputs},
            RowMajor{b.grad_x, s.inputs, nullptr, false}, {s.batch, s.inputs, s.outputs}, threads);
  if (b.grad_weight)
    product(MaskedColumns{b.grad, b.out, s.outputs, b.grad_bias}, RowsAsSteps{b.x, b.x_stride},
            RowMajor{b.grad_weight, s.inputs, nullptr, false}, {s.outputs, s.inputs, s.batch},
            threads);
}

}  // namespace

#if defined(SHARDLAB_BF16_PRODUCTS)
void linear_forward_bf16(const LinearShape& s, const LinearForwardBf16& f, int threads);
void linear_backward_bf16(const LinearShape& s, const LinearBackwardBf16& b, int threads);
extern const LinearKernels linear_kernels{forward, backward, linear_forward_bf16,
                                          linear_backward_bf16};
#else
extern const LinearKernels linear_kernels{forward, backward, nullptr, nullptr};
#endif

}  // namespace shardlab::SHARDLAB_ISA
