// Generators for stochastic rounding to fp16, side by side: per-element Philox, the byte-reuse trick
// of FBGEMM's CPU kernels, and csrc/random.h. Compiled by codec_rng.py. Each encodes the
// same n floats as rows first, first + 1, ... to fp16 codes, `stride` elements from row to row; n is
// a multiple of 64.
#define SHARDLAB_ISA avx512
#include "encode.h"

using namespace shardlab::avx512;

namespace {

// Philox4x32-10 (Salmon et al. 2011), sixteen counters at a time; four words a counter, so four
// vectors of elements take one call: a word each.
struct Philox {
  Bits key0, key1;
  static void multiply(Bits x, uint32_t by, Bits& high, Bits& low) {
    const __m512i wide = _mm512_set1_epi32((int)by);
    const __m512i even = _mm512_mul_epu32((__m512i)x, wide);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)x, 32), wide);
    high = (Bits)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
    low = (Bits)_mm512_mullo_epi32((__m512i)x, wide);
  }
  void words(uint64_t row, uint32_t block, Bits out[4]) const {
    constexpr Bits kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    Bits c0 = kLane + block, c1{}, c2 = Bits{} + (uint32_t)row, c3 = Bits{} + (uint32_t)(row >> 32);
    Bits k0 = key0, k1 = key1;
    for (int round = 0; round < 10; ++round) {
      Bits high0, low0, high1, low1;
      multiply(c0, 0xD2511F53u, high0, low0);
      multiply(c2, 0xCD9E8D57u, high1, low1);
      c0 = high1 ^ c1 ^ k0;
      c1 = low1;
      c2 = high0 ^ c3 ^ k1;
      c3 = low0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
  }
};

// xoshiro128++ (Blackman and Vigna 2019) in every lane.
struct Xoshiro {
  Bits s[4];
  explicit Xoshiro(uint64_t seed) {
    for (Bits& part : s)
      for (int lane = 0; lane < kLanes; ++lane) part[lane] = (uint32_t)(seed = mix64(seed + kGolden64));
  }
  static Bits turn(Bits x, int by) { return (x << by) | (x >> (32 - by)); }
  Bits next() {
    const Bits out = turn(s[0] + s[3], 7) + s[0], t = s[1] << 9;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = turn(s[3], 11);
    return out;
  }
};

// Eight bits below the kept ones, then truncation; as published, also below the normal range.
inline Shorts encode_bytes(Vec v, Bits word, int byte) {
  const Bits noise = ((word >> (8 * byte)) & 0xffu) << 5;
  return (Shorts)_mm512_cvtps_ph((__m512)((Bits)v + noise), _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
}

}  // namespace

extern "C" {

#define ROWS for (uint64_t row = first; row < first + rows; ++row, out += stride)

void encode_philox(const float* in, uint16_t* out, int64_t n, uint64_t key, uint64_t first,
                   uint64_t rows, int64_t stride) {
  const Philox philox{Bits{} + (uint32_t)key, Bits{} + (uint32_t)(key >> 32)};
  ROWS for (int64_t c = 0; c < n; c += 4 * kLanes) {
    Bits words[4];
    philox.words(row, (uint32_t)c, words);
    for (int k = 0; k < 4; ++k)
      store_shorts(out + c + k * kLanes, encode_fp16<true>(load(in + c + k * kLanes), words[k]),
                   kLanes);
  }
}

void encode_byte_reuse(const float* in, uint16_t* out, int64_t n, uint64_t key, uint64_t first,
                       uint64_t rows, int64_t stride) {
  Xoshiro state(key);
  ROWS for (int64_t c = 0; c < n; c += 4 * kLanes) {
    const Bits word = state.next();
    for (int k = 0; k < 4; ++k)
      store_shorts(out + c + k * kLanes, encode_bytes(load(in + c + k * kLanes), word, k), kLanes);
  }
}

void encode_ours(const float* in, uint16_t* out, int64_t n, uint64_t key, uint64_t first,
                 uint64_t rows, int64_t stride) {
  ROWS {
    RandomColumns columns(row_word(key, (int64_t)row), 0);
    for (int64_t c = 0; c < n; c += kLanes)
      store_shorts(out + c, encode_fp16<true>(load(in + c), columns.at(c)), kLanes);
  }
}

void encode_nearest(const float* in, uint16_t* out, int64_t n, uint64_t, uint64_t first,
                    uint64_t rows, int64_t stride) {
  ROWS for (int64_t c = 0; c < n; c += kLanes)
    store_shorts(out + c, encode_fp16<false>(load(in + c), Bits{}), kLanes);
}

}  // extern "C"
