// A layer with fewer outputs than a register tile is wide, such as the one that gives the logit: its
// products are sums of a few rows, bound by reading x once and writing its gradient once.
//
//   Io    X, Y: elements of x and of out; load, store: vectors of X as fp32; get, put: elements of Y;
//         weight: what of an fp32 weight enters the product
//
// Every element is summed by one thread in an order that depends on the shape alone.
#pragma once
#include <algorithm>

#include "linear.h"
#include "tile.h"

namespace shardlab::SHARDLAB_ISA {

constexpr int64_t kNarrowOutputs = 8;  // fewer are narrow

inline float lane_sum(Wide v) {
  float sum = 0.f;
  for (int i = 0; i < kWidth; ++i) sum += v[i];
  return sum;
}

// The weights as they enter the products, [outputs, inputs]; valid until this thread's next call.
template <class Io>
const float* narrow_weights(const LinearShape& s, const float* weight) {
  static thread_local Scratch rounded;
  float* to = rounded.at_least(s.outputs * s.inputs + kWidth);
  for (int64_t i = 0; i < s.outputs * s.inputs; i += kWidth) {
    const int64_t n = std::min<int64_t>(kWidth, s.outputs * s.inputs - i);
    wide_store(to + i, Io::weight(wide_load_part(weight + i, n)));
  }
  return to;
}

template <class Io>
void narrow_forward(const LinearShape& s, const typename Io::X* x, int64_t x_stride,
                    const float* weight, const float* bias, typename Io::Y* out, bool relu,
                    int threads) {
  const float* weights = narrow_weights<Io>(s, weight);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t o = 0; o < s.outputs; ++o) {
      const typename Io::X* row = x + b * x_stride;
      const float* w = weights + o * s.inputs;
      Wide even{}, odd{};
      int64_t k = 0;
      for (; k + 2 * kWidth <= s.inputs; k += 2 * kWidth) {
        even += Io::load(row + k, kWidth) * wide_load(w + k);
        odd += Io::load(row + k + kWidth, kWidth) * wide_load(w + k + kWidth);
      }
      for (; k < s.inputs; k += kWidth) {
        const int64_t n = std::min<int64_t>(kWidth, s.inputs - k);
        even += Io::load(row + k, n) * wide_load_part(w + k, n);
      }
      float value = lane_sum(even + odd) + (bias ? bias[o] : 0.f);
      if (relu) value = value < 0.f ? 0.f : value;  // keeps a NaN
      Io::put(out + b * s.outputs + o, value);
    }
}

// The gradient where the layer's output is above zero.
template <class Io>
float narrow_grad(const typename Io::Y* grad, const typename Io::Y* out, int64_t at) {
  return out && Io::get(out[at]) <= 0.f ? 0.f : Io::get(grad[at]);
}

template <class Io>
void narrow_grad_x(const LinearShape& s, const typename Io::Y* grad, const typename Io::Y* out,
                   const float* weight, typename Io::X* grad_x, int threads) {
  const float* weights = narrow_weights<Io>(s, weight);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t b = 0; b < s.batch; ++b) {
    float g[kNarrowOutputs];
    for (int64_t o = 0; o < s.outputs; ++o) g[o] = narrow_grad<Io>(grad, out, b * s.outputs + o);
    for (int64_t k = 0; k < s.inputs; k += kWidth) {
      const int64_t n = std::min<int64_t>(kWidth, s.inputs - k);
      Wide sum{};
      for (int64_t o = 0; o < s.outputs; ++o)
        sum += g[o] * wide_load_part(weights + o * s.inputs + k, n);
      Io::store(grad_x + b * s.inputs + k, sum, n);
    }
  }
}

// A thread sums some columns over all samples, in the gradient itself.
template <class Io>
void narrow_grad_weight(const LinearShape& s, const typename Io::Y* grad,
                        const typename Io::Y* out, const typename Io::X* x, int64_t x_stride,
                        float* grad_weight, int threads) {
  const int64_t blocks = (s.inputs + kWidth - 1) / kWidth;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t part = 0; part < threads; ++part) {
    const int64_t first = part * blocks / threads * kWidth;
    const int64_t end = std::min((part + 1) * blocks / threads * kWidth, s.inputs);
    for (int64_t o = 0; o < s.outputs; ++o) {
      float* sums = grad_weight + o * s.inputs;
      for (int64_t k = first; k < end; ++k) sums[k] = 0.f;
      for (int64_t b = 0; b < s.batch; ++b) {
        const float g = narrow_grad<Io>(grad, out, b * s.outputs + o);
        const typename Io::X* row = x + b * x_stride;
        for (int64_t k = first; k < end; k += kWidth) {
          const int64_t n = std::min<int64_t>(kWidth, end - k);
          wide_store_part(sums + k, wide_load_part(sums + k, n) + g * Io::load(row + k, n), n);
        }
      }
    }
  }
}

template <class Io>
void narrow_grad_bias(const LinearShape& s, const typename Io::Y* grad,
                      const typename Io::Y* out, float* grad_bias) {
  for (int64_t o = 0; o < s.outputs; ++o) {
    float sum = 0.f;
    for (int64_t b = 0; b < s.batch; ++b) sum += narrow_grad<Io>(grad, out, b * s.outputs + o);
    grad_bias[o] = sum;
  }
}

}  // namespace shardlab::SHARDLAB_ISA
