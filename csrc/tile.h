// A register tile of a matrix product, in vectors of the instruction set's own width: the inner
// loop of linear.cpp and interaction.cpp.
//
// vec.h's sixteen lanes are wider than the registers of most instruction sets, and a tile lives on
// keeping its accumulators in registers, so the width here follows the instruction set.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace shardlab::SHARDLAB_ISA {

// A tile of kTileRows x kTileVecs accumulators leaves registers for one row of B and a splat: of 32
// registers with AVX-512, of 16 elsewhere.
#if defined(__AVX512F__)
constexpr int kWidth = 16, kTileRows = 8, kTileVecs = 2;
#elif defined(__AVX__)
constexpr int kWidth = 8, kTileRows = 6, kTileVecs = 2;
#else
constexpr int kWidth = 4, kTileRows = 6, kTileVecs = 2;
#endif
constexpr int kTileColumns = kWidth * kTileVecs;

typedef float Wide __attribute__((vector_size(kWidth * 4), may_alias));
typedef float WideU __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));

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

// The left operand of a tile: element (row r, step k) is data[r * row_stride + k * step].
struct TileRows {
  const float* data;
  int64_t row_stride, step;
};

// sum[r][v] = sum over k of a(r, k) * b[k * b_stride + v * kWidth ..], k ascending.
template <int R, int V>
inline __attribute__((always_inline)) void tile(int64_t steps, TileRows a, const float* b,
                                                int64_t b_stride, Wide (&sum)[R][V]) {
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = Wide{};
  for (int64_t k = 0; k < steps; ++k) {
    Wide row[V];
    for (int v = 0; v < V; ++v) row[v] = wide_load(b + k * b_stride + v * kWidth);
    for (int r = 0; r < R; ++r) {
      const float scale = a.data[r * a.row_stride + k * a.step];
      for (int v = 0; v < V; ++v) sum[r][v] += scale * row[v];
    }
  }
}

}  // namespace shardlab::SHARDLAB_ISA
