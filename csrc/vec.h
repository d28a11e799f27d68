// Sixteen lanes of 4 bytes: one source for every instruction set. Lane order and reduction order
// are fixed, so that results do not depend on the register width.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "parts.h"

namespace shardlab::SHARDLAB_ISA {

constexpr int kLanes = 16;
constexpr int kCacheLine = 64;

// Functions that only prefetch have no effect that the compiler knows: unless they are inlined, it
// drops the calls. Lanes that are passed to a function of their own go through memory.
#define SHARDLAB_INLINE __attribute__((always_inline))

#if defined(__AVX512F__)
typedef float Vec __attribute__((vector_size(64)));
typedef int32_t Int __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
#else
typedef Parts<float, kLanes> Vec;
typedef Parts<int32_t, kLanes> Int;
typedef Parts<uint32_t, kLanes> Bits;
#endif

template <class V, class T>
SHARDLAB_INLINE inline V load_lanes(const T* p) {
  if constexpr (std::is_class_v<V>) {
    return V::load(p);
  } else {
    V v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
}
#if defined(__AVX512F__)
typedef float VecU __attribute__((vector_size(64), aligned(4)));

inline Vec load(const float* p) { return *reinterpret_cast<const VecU*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<VecU*>(p) = v; }
#else
SHARDLAB_INLINE inline Vec load(const float* p) { return Vec::load(p); }
SHARDLAB_INLINE inline void store(float* p, Vec v) { v.store(p); }
#endif
SHARDLAB_INLINE inline Vec splat(float x) { return Vec{} + x; }

SHARDLAB_INLINE inline Vec load_part(const float* p, int64_t n) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#elif defined(__AVX__)
  alignas(64) static constexpr int32_t kMasks[2 * kLanes] = {-1, -1, -1, -1, -1, -1, -1, -1,
                                                             -1, -1, -1, -1, -1, -1, -1, -1};
  const __m256i* mask = (const __m256i*)(kMasks + kLanes - n);
  return {_mm256_maskload_ps(p, _mm256_loadu_si256(mask)),
          _mm256_maskload_ps(p + kLanes / 2, _mm256_loadu_si256(mask + 1))};
#else
  float v[kLanes] = {};
  std::memcpy(v, p, n * sizeof(float));
  return load(v);
#endif
}

SHARDLAB_INLINE inline void store_part(float* p, Vec v, int64_t n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#else
  float lanes[kLanes];
  store(lanes, v);
  std::memcpy(p, lanes, n * sizeof(float));
#endif
}

#if defined(__AVX512F__)
inline Vec sqrt(Vec v) { return (Vec)_mm512_sqrt_ps((__m512)v); }
inline Vec to_floats(Int v) { return __builtin_convertvector(v, Vec); }
inline Int to_ints(Vec v) { return __builtin_convertvector(v, Int); }
#else
typedef LanesOf<float, kRegisterBytes / 4>::type FloatRegister;
typedef LanesOf<int32_t, kRegisterBytes / 4>::type IntRegister;

SHARDLAB_INLINE inline Vec sqrt(Vec v) {
  return each<Vec>(v, [](FloatRegister x) SHARDLAB_INLINE {
#if defined(__AVX__)
    return (FloatRegister)_mm256_sqrt_ps(x);
#elif defined(__SSE2__)
    return (FloatRegister)_mm_sqrt_ps(x);
#else
    for (int i = 0; i < kRegisterBytes / 4; ++i) x[i] = std::sqrt(x[i]);
    return x;
#endif
  });
}
SHARDLAB_INLINE inline Vec to_floats(Int v) {
  return each<Vec>(v, [](IntRegister x) SHARDLAB_INLINE {
    return __builtin_convertvector(x, FloatRegister);
  });
}
// Towards zero.
SHARDLAB_INLINE inline Int to_ints(Vec v) {
  return each<Int>(v, [](FloatRegister x) SHARDLAB_INLINE {
    return __builtin_convertvector(x, IntRegister);
  });
}
#endif

inline Vec clamp(Vec v, float bound) {
  const Vec high = splat(bound), low = splat(-bound);
  v = pick(v > high, high, v);
  return pick(v < low, low, v);
}

typedef float Half __attribute__((vector_size(32)));
typedef float Quarter __attribute__((vector_size(16)));

// Halves onto each other, in a fixed order. Through register halves, not through memory: a store
// that a narrower load reads back costs more than the rest of a small row's update.
SHARDLAB_INLINE inline float reduce_add(Vec v) {
#if defined(__AVX512F__)
  Half half[2];
  std::memcpy(half, &v, sizeof(v));
  const Half sum = half[0] + half[1];
#else
  const Vec::Half sum = v.low + v.high;
#endif
  Quarter quarter[2];
  std::memcpy(quarter, &sum, sizeof(sum));
  quarter[0] += quarter[1];
  return (quarter[0][0] + quarter[0][2]) + (quarter[0][1] + quarter[0][3]);
}

SHARDLAB_INLINE inline void prefetch_read(const void* p, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += kCacheLine) __builtin_prefetch((const char*)p + b, 0, 3);
}
SHARDLAB_INLINE inline void prefetch_write(const void* p, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += kCacheLine) __builtin_prefetch((const char*)p + b, 1, 3);
}

}  // namespace shardlab::SHARDLAB_ISA
