// A register tile of a matrix product, in vectors of the instruction set's own width: the inner
// loop of linear.cpp and interaction.cpp.
//
// vec.h's sixteen lanes are wider than the registers of most instruction sets, and a tile lives on
// keeping its accumulators in registers, so the width here follows the instruction set.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace shardlab::SHARDLAB_ISA {

// A tile of kTileRows x kTileVecs accumulators leaves registers for one row of B and a splat: of 32
// registers with AVX-512, of 16 elsewhere.
#if defined(__AVX512F__)
constexpr int kWidth = 16, kTileRows = 8, kTileVecs = 1;
#elif defined(__AVX__)
constexpr int kWidth = 8, kTileRows = 6, kTileVecs = 2;
#else
constexpr int kWidth = 4, kTileRows = 6, kTileVecs = 2;
#endif
constexpr int kTileColumns = kWidth * kTileVecs;

typedef float Wide __attribute__((vector_size(kWidth * 4), may_alias));
typedef float WideU __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Scratch on cache lines: a vector load that crosses a line costs two.
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t count) { std::fill_n(at_least(count), count, 0.f); }

  // Room for `count` elements; what was there is lost when it has to grow.
  float* at_least(int64_t count) {
    if (count > size_) {
      data_.reset(new (std::align_val_t{kAlign}) float[count]);
      size_ = count;
    }
    return data_.get();
  }
  float* data() const { return data_.get(); }

 private:
  static constexpr size_t kAlign = 64;
  struct Free {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t{kAlign}); }
  };
  std::unique_ptr<float[], Free> data_;
  int64_t size_ = 0;
};

inline Wide wide_load(const float* p) { return *reinterpret_cast<const WideU*>(p); }
inline void wide_store(float* p, Wide v) { *reinterpret_cast<WideU*>(p) = v; }

// The first n of kWidth lanes, 0 <= n <= kWidth.
inline Wide wide_load_part(const float* p, int64_t n) {
  if (n == kWidth) return wide_load(p);
#if defined(__AVX512F__)
  return (Wide)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
  Wide v{};
  std::memcpy(&v, p, n * sizeof(float));
  return v;
#endif
}

inline void wide_store_part(float* p, Wide v, int64_t n) {
  if (n == kWidth) return wide_store(p, v);
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#else
  std::memcpy(p, &v, n * sizeof(float));
#endif
}

// to[c][r] = from[r][c], in blocks of 4 x 4 registers where there are any.
inline void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns,
                      float* to, int64_t to_stride) {
  int64_t whole_rows = 0, whole_columns = 0;
#if defined(__SSE__)
  constexpr int64_t kSide = 4;
  whole_rows = rows / kSide * kSide, whole_columns = columns / kSide * kSide;
  for (int64_t r = 0; r < whole_rows; r += kSide)
    for (int64_t c = 0; c < whole_columns; c += kSide) {
      const float* block = from + r * from_stride + c;
      __m128 a = _mm_loadu_ps(block), b = _mm_loadu_ps(block + from_stride);
      __m128 d = _mm_loadu_ps(block + 2 * from_stride), e = _mm_loadu_ps(block + 3 * from_stride);
      _MM_TRANSPOSE4_PS(a, b, d, e);
      float* turned = to + c * to_stride + r;
      _mm_storeu_ps(turned, a);
      _mm_storeu_ps(turned + to_stride, b);
      _mm_storeu_ps(turned + 2 * to_stride, d);
      _mm_storeu_ps(turned + 3 * to_stride, e);
    }
#endif
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c)
      to[c * to_stride + r] = from[r * from_stride + c];
}

// The left operand of a tile: element (row r, step k) is data[r * row_stride + k * step].
struct TileRows {
  const float* data;
  int64_t row_stride, step;
};

// What a step of a tile does: sum + *scale * row.
struct MultiplyAdd {
  static inline __attribute__((always_inline)) Wide run(Wide sum, const float* scale, Wide row) {
    return sum + *scale * row;
  }
};

struct NoWork {
  void operator()() const {}
};

// result[r][v] = sum over k of a(r, k) * b[k * b_stride + v * kWidth ..], k ascending. Every step
// calls `beside` once.
template <class Multiply, int R, int V, class Beside = NoWork>
inline __attribute__((always_inline)) void tile(int64_t steps, TileRows a, const float* b,
                                                int64_t b_stride, Wide (&result)[R][V],
                                                Beside&& beside = {}) {
  Wide sum[R][V] = {};  // a local that never leaves stays in registers
  for (int64_t k = 0; k < steps; ++k) {
    beside();
    Wide row[V];
    for (int v = 0; v < V; ++v) row[v] = wide_load(b + k * b_stride + v * kWidth);
    for (int r = 0; r < R; ++r) {
      const float* scale = a.data + r * a.row_stride + k * a.step;
      for (int v = 0; v < V; ++v) sum[r][v] = Multiply::run(sum[r][v], scale, row[v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) result[r][v] = sum[r][v];
}

}  // namespace shardlab::SHARDLAB_ISA
