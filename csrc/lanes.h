// Sixteen integer lanes beside the fp32 lanes of vec.h, and loads and stores of narrow elements.
#pragma once
#include "vec.h"

namespace shardlab::SHARDLAB_ISA {

// Calls body(column, lanes) for every vector of a row, two at a time: what their random bits share
// is then in registers. Declare bodies SHARDLAB_INLINE: as functions of their own they would take
// vectors and constants through memory.
template <class Body>
SHARDLAB_INLINE inline void for_columns(int64_t columns, const Body& body) {
  int64_t c = 0;
  for (; c + 2 * kLanes <= columns; c += 2 * kLanes) {
    body(c, kLanes);
    body(c + kLanes, kLanes);
  }
  if (c + kLanes <= columns) {
    body(c, kLanes);
    c += kLanes;
  }
  if (c < columns) body(c, (int)(columns - c));
}
SHARDLAB_INLINE inline Vec read(const float* p, int lanes) {
  return lanes == kLanes ? load(p) : load_part(p, lanes);
}
SHARDLAB_INLINE inline void write_lanes(float* target, Vec value, int64_t lanes) {
  if (lanes == kLanes)
    store(target, value);
  else
    store_part(target, value, lanes);
}

typedef uint16_t Shorts __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(16)));

inline Shorts load_shorts(const void* p, int64_t n) {
  Shorts v{};
  if (n == kLanes) {
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
#if defined(__AVX512BW__)
  return (Shorts)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
#else
  std::memcpy(&v, p, n * sizeof(uint16_t));
  return v;
#endif
}

inline void store_shorts(void* p, Shorts v, int64_t n) {
  if (n == kLanes) {
    std::memcpy(p, &v, sizeof(v));
    return;
  }
#if defined(__AVX512BW__)
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)v);
#else
  std::memcpy(p, &v, n * sizeof(uint16_t));
#endif
}

inline Bytes load_bytes(const void* p, int64_t n) {
  Bytes v{};
  if (n == kLanes) {
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
#if defined(__AVX512BW__)
  return (Bytes)_mm_maskz_loadu_epi8((__mmask16)((1u << n) - 1), p);
#else
  std::memcpy(&v, p, n);
  return v;
#endif
}

inline void store_bytes(void* p, Bytes v, int64_t n) {
  if (n == kLanes) {
    std::memcpy(p, &v, sizeof(v));
    return;
  }
#if defined(__AVX512BW__)
  _mm_mask_storeu_epi8(p, (__mmask16)((1u << n) - 1), (__m128i)v);
#else
  std::memcpy(p, &v, n);
#endif
}

// Conversions between widths; compilers take __builtin_convertvector apart into scalars here.
#if defined(__AVX512BW__)
inline Int widen_signed(Bytes v) { return (Int)_mm512_cvtepi8_epi32((__m128i)v); }
inline Bits widen(Shorts v) { return (Bits)_mm512_cvtepu16_epi32((__m256i)v); }
inline Shorts widen(Bytes v) { return (Shorts)_mm256_cvtepu8_epi16((__m128i)v); }
inline Shorts narrow_to_shorts(Int v) { return (Shorts)_mm512_cvtepi32_epi16((__m512i)v); }
inline Bytes narrow_to_bytes(Int v) { return (Bytes)_mm512_cvtepi32_epi8((__m512i)v); }
#elif defined(__AVX2__)
SHARDLAB_INLINE inline Int widen_signed(Bytes v) {
  return {(Int::Half)_mm256_cvtepi8_epi32((__m128i)v),
          (Int::Half)_mm256_cvtepi8_epi32(_mm_srli_si128((__m128i)v, 8))};
}
SHARDLAB_INLINE inline Bits widen(Shorts v) {
  return {(Bits::Half)_mm256_cvtepu16_epi32(_mm256_castsi256_si128((__m256i)v)),
          (Bits::Half)_mm256_cvtepu16_epi32(_mm256_extracti128_si256((__m256i)v, 1))};
}
SHARDLAB_INLINE inline Shorts widen(Bytes v) { return (Shorts)_mm256_cvtepu8_epi16((__m128i)v); }
// Of the low 16 bits: packing saturates, and works within halves of a register.
SHARDLAB_INLINE inline Shorts narrow_to_shorts(Int v) {
  const __m256i low = _mm256_set1_epi32(0xffff);
  const __m256i packed = _mm256_packus_epi32(_mm256_and_si256((__m256i)v.low, low),
                                             _mm256_and_si256((__m256i)v.high, low));
  return (Shorts)_mm256_permute4x64_epi64(packed, 0xd8);
}
SHARDLAB_INLINE inline Bytes narrow_to_bytes(Int v) {
  const __m256i shorts = (__m256i)narrow_to_shorts(v & 0xff);
  return (Bytes)_mm_packus_epi16(_mm256_castsi256_si128(shorts),
                                 _mm256_extracti128_si256(shorts, 1));
}
#else
// One element by itself; loops of a fixed length become what vectors the processor has.
template <class To, class ToElement, class FromElement, class From>
SHARDLAB_INLINE inline To convert(From v) {
  FromElement from[kLanes];
  ToElement to[kLanes];
  std::memcpy(from, &v, sizeof(from));
  for (int i = 0; i < kLanes; ++i) to[i] = (ToElement)from[i];
  return load_lanes<To>(to);
}
inline Int widen_signed(Bytes v) { return convert<Int, int32_t, int8_t>(v); }
inline Bits widen(Shorts v) { return convert<Bits, uint32_t, uint16_t>(v); }
inline Shorts widen(Bytes v) { return convert<Shorts, uint16_t, uint8_t>(v); }
inline Shorts narrow_to_shorts(Int v) { return convert<Shorts, uint16_t, int32_t>(v); }
inline Bytes narrow_to_bytes(Int v) { return convert<Bytes, uint8_t, int32_t>(v); }
#endif

SHARDLAB_INLINE inline Int smaller(Int a, Int b) { return pick(a < b, a, b); }
SHARDLAB_INLINE inline Int larger(Int a, Int b) { return pick(a > b, a, b); }

// Largest lane; through register halves, as reduce_add is.
SHARDLAB_INLINE inline int32_t reduce_max(Int v) {
  typedef int32_t QuarterInt __attribute__((vector_size(16)));
#if defined(__AVX512F__)
  typedef int32_t HalfInt __attribute__((vector_size(32)));
  HalfInt half[2];
  std::memcpy(half, &v, sizeof(v));
  half[0] = half[0] > half[1] ? half[0] : half[1];
#else
  const Int::Half half[] = {pick(v.low > v.high, v.low, v.high)};
#endif
  QuarterInt q[2];
  std::memcpy(q, half, sizeof(q));
  q[0] = q[0] > q[1] ? q[0] : q[1];
  const int32_t a = q[0][0] > q[0][2] ? q[0][0] : q[0][2];
  const int32_t b = q[0][1] > q[0][3] ? q[0][1] : q[0][3];
  return a > b ? a : b;
}

inline float as_float(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace shardlab::SHARDLAB_ISA
