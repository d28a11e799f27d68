// The bf16 operands of the layer's three products; see product.h. A step is a pair of neighbours
// along the inner dimension, packed into 32 bits with the earlier one in the low half: one
// instruction multiplies sixteen pairs and adds both products to fp32 sums.
#include "linear.h"

#if defined(SHARDLAB_BF16_PRODUCTS)
#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "tile.h"

namespace shardlab::SHARDLAB_ISA {
namespace {

// Written out because GCC 12 broadcasts the pair by an instruction of its own, which takes a
// quarter of the speed; as an operand the broadcast is free.
struct MultiplyAddPairs {
  static inline __attribute__((always_inline)) Wide run(Wide sum, const float* pair, Wide row) {
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(row), "m"(*pair));
    return sum;
  }
};

}  // namespace
}  // namespace shardlab::SHARDLAB_ISA

// From here on this file may use the extension; the caller asks the processor for it first. What is
// above, tile.h above all, stays free of it, because the linker shares it with other files.
#pragma GCC push_options
#pragma GCC target("avx512bf16")
// GCC 12 warns of its own intrinsics' deliberately undefined registers (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "narrow.h"
#include "product.h"

namespace shardlab::SHARDLAB_ISA {
namespace {

using Bits = uint16_t;  // of a bf16
constexpr int64_t kUnlimited = int64_t{1} << 40;

inline __mmask16 first(int64_t n) { return (__mmask16)((1u << n) - 1); }

// n <= 16 elements as 32-bit lanes with the bf16 in the low half, zero beyond n.
inline __m512i low_halves(const Bits* p, int64_t n) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), p));
}
inline __m512i low_halves(const float* p, int64_t n) {
  return _mm512_cvtepu16_epi32(
      (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(first(n), p)));
}

// The same, as zero when there is no such row.
template <class Source>
inline __m512i low_halves_or_zero(const Source* p, int64_t n) {
  return p ? low_halves(p, n) : _mm512_setzero_si512();
}

inline __m512i pairs(__m512i low, __m512i high) {
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// out[0 .. ceil(count / 2)) = a row's neighbours as pairs; writes whole vectors.
template <class Source>
inline void pair_row(const Source* row, int64_t count, float* out) {
  auto* to = reinterpret_cast<Bits*>(out);
  for (int64_t c = 0; c < count; c += kWidth) {
    const int64_t n = std::min<int64_t>(kWidth, count - c);
    _mm256_storeu_si256((__m256i*)(to + c), _mm512_cvtepi32_epi16(low_halves(row + c, n)));
  }
  if (count % (2 * kWidth) != 0 && count % (2 * kWidth) <= kWidth)
    _mm256_storeu_si256((__m256i*)(to + round_up(count, kWidth)), _mm256_setzero_si256());
}

// ---------------------------------------------------------------- right operands
// Pairs of rows of a row-major matrix with `rows` rows as steps.
template <class Source>
struct RowPairsAsSteps {
  const Source* data;
  int64_t stride, rows;

  void pack(Range ks, Range ns, float* panels) const {
    for (int64_t k = 0; k < ks.count; ++k) {
      const int64_t row = 2 * (ks.begin + k);
      const Source* low = data + row * stride + ns.begin;
      const Source* high = row + 1 < rows ? low + stride : nullptr;
      for (int64_t c = 0; c < ns.count; c += kPanel) {
        const int64_t n = std::min(kPanel, ns.count - c);
        const __m512i both = pairs(low_halves(low + c, n),
                                   low_halves_or_zero(high ? high + c : nullptr, n));
        _mm512_storeu_si512(panels + c * ks.count + k * kPanel, both);
      }
    }
  }
};

// Pairs of columns of a row-major fp32 matrix with `columns` columns as steps.
struct ColumnPairsAsSteps {
  const float* data;
  int64_t columns;

  void pack(Range ks, Range ns, float* panels) const {
    static thread_local Scratch paired;
    const int64_t width = round_up(ks.count, kWidth);
    float* rows = paired.at_least(kPanel * width);
    const int64_t count = std::min(2 * ks.count, columns - 2 * ks.begin);
    for (int64_t c = 0; c < ns.count; c += kPanel) {
      const int64_t n = std::min(kPanel, ns.count - c);
      if (n < kPanel) std::fill_n(rows, kPanel * width, 0.f);
      for (int64_t j = 0; j < n; ++j)
        pair_row(data + (ns.begin + c + j) * columns + 2 * ks.begin, count, rows + j * width);
      transpose(rows, width, kPanel, ks.count, panels + c * ks.count, kPanel);
    }
  }
};

// ---------------------------------------------------------------- left operands
// Rows of x. All steps at once: a bf16 target cannot hold a sum that is not complete.
template <class Source>
struct PairedRows {
  using Multiply = MultiplyAddPairs;
  static constexpr int64_t kBlock = kTileRows, kSteps = kUnlimited;
  const Source* data;
  int64_t stride, columns;

  Strips strips(Range rows, Range ks, bool, float* scratch) const {
    const int64_t width = round_up(ks.count, kWidth);
    if (rows.count < kTileRows) std::fill_n(scratch, kTileRows * width, 0.f);
    for (int64_t r = 0; r < rows.count; ++r)
      pair_row(data + (rows.begin + r) * stride, columns, scratch + r * width);
    return {{scratch, width, 1}, 0};
  }
};

// n <= 16 elements of the gradient where the layer's output is above zero, as `low_halves`.
inline __m512i masked(const Bits* grad, const Bits* out, int64_t n) {
  const __m512i g = low_halves(grad, n);
  if (!out) return g;
  // Shifted up, the sign bit of the bf16 is that of the lane.
  const __m512i y = _mm512_slli_epi32(low_halves(out, n), 16);
  return _mm512_maskz_mov_epi32(_mm512_cmpgt_epi32_mask(y, _mm512_setzero_si512()), g);
}

// Rows of the masked gradient [B, N], N columns.
struct MaskedRowPairs {
  using Multiply = MultiplyAddPairs;
  static constexpr int64_t kBlock = kTileRows, kSteps = kUnlimited;
  const Bits *grad, *out;
  int64_t columns;

  Strips strips(Range rows, Range ks, bool, float* scratch) const {
    const int64_t width = round_up(ks.count, kWidth);
    std::fill_n(scratch, kTileRows * width, 0.f);
    for (int64_t r = 0; r < rows.count; ++r) {
      auto* to = reinterpret_cast<Bits*>(scratch + r * width);
      for (int64_t c = 0; c < columns; c += kWidth) {
        const int64_t n = std::min<int64_t>(kWidth, columns - c);
        const int64_t at = (rows.begin + r) * columns + c;
        const __m512i g = masked(grad + at, out ? out + at : nullptr, n);
        _mm256_storeu_si256((__m256i*)(to + c), _mm512_cvtepi32_epi16(g));
      }
    }
    return {{scratch, width, 1}, 0};
  }
};

// Columns of the masked gradient [B, N] as rows, pairs of samples as steps, with the columns' sums
// on the way.
struct MaskedColumnPairs {
  using Multiply = MultiplyAddPairs;
  static constexpr int64_t kBlock = kWideBlock, kSteps = kDepth / 2;
  const Bits *grad, *out;
  int64_t columns, batch;
  float* sums;  // or null

  __m512i row(int64_t sample, int64_t column, int64_t n) const {
    if (sample >= batch) return _mm512_setzero_si512();
    const int64_t at = sample * columns + column;
    __builtin_prefetch(grad + at + 2 * kAhead * columns);
    if (out) __builtin_prefetch(out + at + 2 * kAhead * columns);
    return masked(grad + at, out ? out + at : nullptr, n);
  }

  Strips strips(Range rows, Range ks, bool first_pass, float* scratch) const {
    const int64_t strips = round_up(rows.count, kTileRows) / kTileRows;
    alignas(64) float line[kWideBlock + kWidth] = {}, total[kWideBlock + kWidth] = {};
    for (int64_t k = 0; k < ks.count; ++k) {
      const int64_t sample = 2 * (ks.begin + k);
      for (int64_t c = 0; c < rows.count; c += kWidth) {
        const int64_t n = std::min<int64_t>(kWidth, rows.count - c);
        const __m512i low = row(sample, rows.begin + c, n);
        const __m512i high = row(sample + 1, rows.begin + c, n);
        _mm512_storeu_si512(line + c, pairs(low, high));
        const Wide even = (Wide)_mm512_slli_epi32(low, 16), odd = (Wide)_mm512_slli_epi32(high, 16);
        wide_store(total + c, wide_load(total + c) + (even + odd));
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

// ---------------------------------------------------------------- targets
inline void put(float* to, Wide value, int64_t n) { wide_store_part(to, value, n); }
inline void put(Bits* to, Wide value, int64_t n) {
  _mm256_mask_storeu_epi16(to, first(n), (__m256i)_mm512_cvtneps_pbh((__m512)value));
}

// Complete sums, with the bias and the ReLU of the forward product.
template <class Element>
struct Rounded {
  Element* data;
  int64_t stride;
  const float* bias;
  bool relu;

  void store(const Wide (&sum)[kTileRows][kTileVecs], Range rows, Range columns, bool,
             bool) const {
    const int64_t n = columns.count;
    const Wide shift = bias ? wide_load_part(bias + columns.begin, n) : Wide{};
    for (int r = 0; r < rows.count; ++r) {
      Wide value = sum[r][0] + shift;
      if (relu) value = value < 0.f ? Wide{} : value;  // keeps a NaN
      put(data + (rows.begin + r) * stride + columns.begin, value, n);
    }
  }
};

struct Accumulated {
  float* data;
  int64_t stride;

  void store(const Wide (&sum)[kTileRows][kTileVecs], Range rows, Range columns, bool add,
             bool) const {
    for (int r = 0; r < rows.count; ++r) {
      float* to = data + (rows.begin + r) * stride + columns.begin;
      Wide value = sum[r][0];
      if (add) value += wide_load_part(to, columns.count);
      wide_store_part(to, value, columns.count);
    }
  }
};
static_assert(kTileVecs == 1 && kWidth == 16, "the targets store one vector of 16 a row");

// ---------------------------------------------------------------- the layer
int64_t halved(int64_t n) { return (n + 1) / 2; }

// x of either dtype enters rounded to bf16, as weights do.
template <class Source>
struct Bf16Io {
  using X = Source;
  using Y = Bits;
  static Wide load(const Source* p, int64_t n) {
    // Whole vectors need no mask, whose making would cost more than the load.
    return (Wide)_mm512_slli_epi32(n == kWidth ? low_halves(p, kWidth) : low_halves(p, n), 16);
  }
  static void store(Source* p, Wide v, int64_t n) { shardlab::SHARDLAB_ISA::put(p, v, n); }
  static float get(Bits y) { return std::bit_cast<float>((uint32_t)y << 16); }
  static void put(Bits* to, float value) {
    shardlab::SHARDLAB_ISA::put(to, (Wide)_mm512_set1_ps(value), 1);
  }
  static Wide weight(Wide w) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh((__m512)w);
    return (Wide)_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16);
  }
};

template <class Source>
void narrow_backward(const LinearShape& s, const LinearBackwardBf16& b, int threads) {
  using Io = Bf16Io<Source>;
  if (b.grad_x) narrow_grad_x<Io>(s, b.grad, b.out, b.weight, (Source*)b.grad_x, threads);
  if (b.grad_weight)
    narrow_grad_weight<Io>(s, b.grad, b.out, (const Source*)b.x, b.x_stride, b.grad_weight,
                           threads);
  if (b.grad_bias) narrow_grad_bias<Io>(s, b.grad, b.out, b.grad_bias);
}

template <class Source>
void forward(const LinearShape& s, const LinearForwardBf16& f, int threads) {
  if (s.outputs < kNarrowOutputs)
    return narrow_forward<Bf16Io<Source>>(s, (const Source*)f.x, f.x_stride, f.weight, f.bias,
                                          f.out, f.relu, threads);
  product(PairedRows<Source>{(const Source*)f.x, f.x_stride, s.inputs},
          ColumnPairsAsSteps{f.weight, s.inputs}, Rounded<Bits>{f.out, s.outputs, f.bias, f.relu},
          {s.batch, s.outputs, halved(s.inputs)}, threads);
}

template <class Source>
void backward(const LinearShape& s, const LinearBackwardBf16& b, int threads) {
  if (s.outputs < kNarrowOutputs) return narrow_backward<Source>(s, b, threads);
  if (b.grad_x)
    product(MaskedRowPairs{b.grad, b.out, s.outputs},
            RowPairsAsSteps<float>{b.weight, s.inputs, s.outputs},
            Rounded<Source>{(Source*)b.grad_x, s.inputs, nullptr, false},
            {s.batch, s.inputs, halved(s.outputs)}, threads);
  if (b.grad_weight)
    product(MaskedColumnPairs{b.grad, b.out, s.outputs, s.batch, b.grad_bias},
            RowPairsAsSteps<Source>{(const Source*)b.x, b.x_stride, s.batch},
            Accumulated{b.grad_weight, s.inputs}, {s.outputs, s.inputs, halved(s.batch)}, threads);
}

}  // namespace

void linear_forward_bf16(const LinearShape& s, const LinearForwardBf16& f, int threads) {
  f.x_is_bf16 ? forward<Bits>(s, f, threads) : forward<float>(s, f, threads);
}

void linear_backward_bf16(const LinearShape& s, const LinearBackwardBf16& b, int threads) {
  b.x_is_bf16 ? backward<Bits>(s, b, threads) : backward<float>(s, b, threads);
}

}  // namespace shardlab::SHARDLAB_ISA
#pragma GCC pop_options
#endif
