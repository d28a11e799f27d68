// Sixteen fp32 lanes through GCC vector extensions: one source for every instruction set. Lane
// order and reduction order are fixed, so that results do not depend on the register width.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace shardlab::SHARDLAB_ISA {

constexpr int kLanes = 16;
constexpr int kCacheLine = 64;
typedef float Vec __attribute__((vector_size(64)));
typedef float VecU __attribute__((vector_size(64), aligned(4)));

inline Vec load(const float* p) { return *reinterpret_cast<const VecU*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<VecU*>(p) = v; }
inline Vec splat(float x) { return Vec{} + x; }

inline Vec load_part(const float* p, int64_t n) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
  Vec v{};
  std::memcpy(&v, p, n * sizeof(float));
  return v;
#endif
}

inline void store_part(float* p, Vec v, int64_t n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#else
  std::memcpy(p, &v, n * sizeof(float));
#endif
}

inline Vec sqrt(Vec v) {
#if defined(__AVX512F__)
  return (Vec)_mm512_sqrt_ps((__m512)v);
#else
  for (int i = 0; i < kLanes; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

inline Vec clamp(Vec v, float bound) {
  const Vec high = splat(bound), low = splat(-bound);
  v = v > high ? high : v;
  return v < low ? low : v;
}

typedef float Half __attribute__((vector_size(32)));
typedef float Quarter __attribute__((vector_size(16)));

// Halves onto each other, in a fixed order. Through register halves, not through memory: a store
// that a narrower load reads back costs more than the rest of a small row's update.
inline float reduce_add(Vec v) {
  Half half[2];
  std::memcpy(half, &v, sizeof(v));
  half[0] += half[1];
  Quarter quarter[2];
  std::memcpy(quarter, half, sizeof(half[0]));
  quarter[0] += quarter[1];
  return (quarter[0][0] + quarter[0][2]) + (quarter[0][1] + quarter[0][3]);
}

// Functions that only prefetch have no effect that the compiler knows: unless they are inlined, it
// drops the calls.
#define SHARDLAB_INLINE __attribute__((always_inline))

SHARDLAB_INLINE inline void prefetch_read(const void* p, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += kCacheLine) __builtin_prefetch((const char*)p + b, 0, 3);
}
SHARDLAB_INLINE inline void prefetch_write(const void* p, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += kCacheLine) __builtin_prefetch((const char*)p + b, 1, 3);
}

}  // namespace shardlab::SHARDLAB_ISA
