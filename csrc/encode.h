// fp32 lanes to codes, to the nearest (ties to even) or stochastically.
//
// Stochastic rounding is unbiased for every value that the codec can reach, subnormals included:
// noise is added at the codec's own step there. Beyond the largest finite value it saturates; what
// a code can hold exactly never moves. Sources: fp16 as in arXiv 2010.11305's lineage, with the
// subnormals done right; the scale's choice is own.
#pragma once
#include "codec.h"
#include "random.h"

namespace shardlab::SHARDLAB_ISA {

constexpr int32_t kInfBits = 0x7f800000, kSignBit = INT32_MIN;

inline Int magnitude_bits(Vec v) { return (Int)v & 0x7fffffff; }

// A float of kMantissa bits whose exponent has the bias kBias and whose largest finite value has
// the fp32 bits kMaxBits. Returns magnitudes; a NaN becomes the largest value.
template <int kMantissa, int kBias, int32_t kMaxBits>
struct MiniFloat {
  static constexpr int kShift = 23 - kMantissa, kRebias = (127 - kBias) << kMantissa;
  static constexpr int32_t kMinNormal = (127 - kBias + 1) << 23;
  static constexpr int kSteps = kBias - 1 + kMantissa;  // a subnormal step is 2^-kSteps
  // Subnormals in fixed point: kMantissa bits before the point and kFraction behind fill 30.
  static constexpr int kFraction = 30 - kMantissa;

  template <bool kStochastic>
  SHARDLAB_INLINE static Int encode(Vec v, Bits random) {
    const Int bits = smaller(magnitude_bits(v), Int{} + kMaxBits);
    const auto subnormal = bits < kMinNormal;
    Int normal, tiny;
    if (kStochastic) {
      normal = bits + (Int)(random >> (32 - kShift));
      const Vec fixed =
          (Vec)pick(subnormal, bits, Int{}) * as_float((127 + kSteps + kFraction) << 23);
      tiny = to_ints(fixed) + (Int)(random >> (32 - kFraction));
      tiny >>= kFraction;
    } else {
      normal = bits + ((1 << (kShift - 1)) - 1) + ((bits >> kShift) & 1);
      const float magic = as_float((127 + 23 - kSteps) << 23);  // its fp32 step is 2^-kSteps
      tiny = (Int)((Vec)bits + magic) - ((127 + 23 - kSteps) << 23);
    }
    return pick(subnormal, tiny, (normal >> kShift) - kRebias);
  }
};

#if defined(__AVX512DQ__)
// The processor's own conversion, with the same results in fewer instructions. Noise is a random
// share of the step that fp16 has at the value, subnormal or not: the fraction of a float below
// 2^-10, with 20 bits as the formula takes of a subnormal, times the value's power of two. What is
// left of value and noise is cut off, and beyond the largest number that is it. A NaN stays one.
template <bool kStochastic>
SHARDLAB_INLINE inline Shorts encode_fp16(Vec v, Bits random) {
  if (!kStochastic) {
    const __m512 top = _mm512_set1_ps(65504.0f), bottom = _mm512_set1_ps(-65504.0f);
    return (Shorts)_mm512_cvtps_ph(_mm512_max_ps(bottom, _mm512_min_ps(top, (__m512)v)),
                                   _MM_FROUND_TO_NEAREST_INT);
  }
  constexpr int kCut = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;
  constexpr int kInfToLargest = 0x00ef0000;        // by kind of number: of fixupimm
  constexpr int kLargerMagnitude = 3;              // with the first one's sign: of range
  constexpr int kFirstAndSecondOrThird = 0xea;     // of ternarylogic
  constexpr int32_t kTop20 = 0x007ffff8, kSignAndExponent = (int32_t)0xff800000;
  const __m512 finite =
      _mm512_fixupimm_ps((__m512)v, (__m512)v, _mm512_set1_epi32(kInfToLargest), 0);
  const __m512 normal = _mm512_range_ps(finite, _mm512_set1_ps(0x1p-14f), kLargerMagnitude);
  const __m512 power =
      _mm512_and_ps(normal, _mm512_castsi512_ps(_mm512_set1_epi32(kSignAndExponent)));
  const __m512 fraction = (__m512)_mm512_ternarylogic_epi32(
      (__m512i)(random >> 9), _mm512_set1_epi32(kTop20), (__m512i)_mm512_set1_ps(0x1p-10f),
      kFirstAndSecondOrThird);
  const __m512 share = _mm512_sub_ps(fraction, _mm512_set1_ps(0x1p-10f));
  return (Shorts)_mm512_cvtps_ph(_mm512_fmadd_round_ps(share, power, finite, kCut), kCut);
}
#else
template <bool kStochastic>
SHARDLAB_INLINE inline Shorts encode_fp16(Vec v, Bits random) {
  Int code = MiniFloat<10, 15, 0x477fe000>::encode<kStochastic>(v, random);
  code = pick(magnitude_bits(v) > kInfBits, Int{} + 0x7e00, code);
  return narrow_to_shorts(code | (((Int)v >> 16) & 0x8000));
}
#endif

template <bool kStochastic>
SHARDLAB_INLINE inline Shorts encode_bf16(Vec v, Bits random) {
  constexpr int32_t kMaxBits = 0x7f7f0000;
  const Int magnitude = magnitude_bits(v);
#if defined(__AVX512DQ__)
  if (kStochastic) {
    constexpr int kSmallerMagnitude = 2, kFirstAndSecondOrThird = 0xea;  // of range, ternarylogic
    const __m512i finite = _mm512_castps_si512(
        _mm512_range_ps((__m512)v, (__m512)splat(as_float(kMaxBits)), kSmallerMagnitude));
    const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
    const Bits bits = (Bits)_mm512_mask_ternarylogic_epi32(
        finite, nan, _mm512_set1_epi32(kSignBit), _mm512_set1_epi32(0x7fc00000),
        kFirstAndSecondOrThird);
    return narrow_to_shorts((Int)((bits + (random >> 16)) >> 16));
  }
#endif
  const Int bits = smaller(magnitude, Int{} + kMaxBits);
  const Int noise = kStochastic ? (Int)(random >> 16) : ((bits >> 16) & 1) + 0x7fff;
  Int code = (bits + noise) >> 16;
  code = pick(magnitude > kInfBits, Int{} + 0x7fc0, code);
  return narrow_to_shorts(code | (((Int)v >> 16) & 0x8000));
}

template <bool kStochastic>
SHARDLAB_INLINE inline Bytes encode_fp8(Vec v, Bits random) {
  const Int code = MiniFloat<3, 7, 0x43e00000>::encode<kStochastic>(v, random);
  return narrow_to_bytes(code | (((Int)v >> 24) & 0x80));
}

template <bool kStochastic>
SHARDLAB_INLINE inline Bytes encode_fp8_e5m2(Vec v, Bits random) {
  const Int code = MiniFloat<2, 15, 0x47600000>::encode<kStochastic>(v, random);
  return narrow_to_bytes(code | (((Int)v >> 24) & 0x80));
}

// round(v / scale), within +-kLargest. The nearest integer first; the remainder is exact, so that
// v = q * scale never moves.
template <bool kStochastic, int kLargest>
SHARDLAB_INLINE inline Int quantise(Vec v, float scale, float inverse, Bits random) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves integers
  Vec q = (v * inverse + kRound) - kRound;
  if (kStochastic) {
    const Vec rest = v - q * scale;
    const Vec unit = to_floats((Int)(random >> 8));
    const Int away = (Vec)magnitude_bits(rest) > unit * (scale * 0x1p-24f);
    const Int one = ((Int)rest & kSignBit) | 0x3f800000;  // 1 with the remainder's sign
    q += (Vec)(one & away);
  }
  const Vec top = splat(kLargest), bottom = splat(-kLargest);
  q = pick(q < top, q, top);
  q = pick(q > bottom, q, bottom);
  return to_ints(q);
}

// ---------------------------------------------------------------- scales
// Of up to sixteen rows, one a lane. The least scale s whose largest value Q s reaches amax would
// drift: a row could round to a largest value that fits the next lower scale r, and be encoded
// anew in it. So, where amax lies between Q r and the next step of s above that, either r is taken
// and everything beyond Q r becomes Q r, or s, and those values are stretched up to that step:
// with such odds that the mean stays. A row then encodes to itself ever after.
struct Scales {
  float scale[kLanes], inverse[kLanes];
  float amax[kLanes], low[kLanes], high[kLanes], stretch[kLanes];  // (low, amax) -> (low, high)
  int32_t code[kLanes], stretched[kLanes];
};

struct IntScale {
  static constexpr int kStep = 1;
  static Int least(Vec amax, float largest) {
    const Vec wanted = amax * (1.0f / largest);
    // Some units too low, so that a product that rounded up does not count; one step up if so.
    Int code = ((Int)wanted + ((1 << kScaleShift) - 1 - 8) - kScaleBias) >> kScaleShift;
    code = smaller(larger(code, Int{}), Int{} + kTopScale);
    const Vec scale = (Vec)((code << kScaleShift) + kScaleBias);
    code -= (Int)(scale * largest < amax);
    return smaller(code, Int{} + kTopScale);
  }
  // The next step of `scale` above low = largest * lower scale.
  static Vec next_step(Vec low, Vec scale) {
    const Vec steps = to_floats(to_ints(low / scale));
    return (steps + 1.0f) * scale;
  }
};

// Of floats whose largest value is 1.75 * 2^kTop; above half of it comes kNext.
template <int kTop, int kNext>
struct FloatScale {
  static constexpr int kStep = 8;  // powers of two: an exponent more is exact
  static Int least(Vec amax, float) {
    // The exponent of amax / largest, up where the fraction exceeds 1.75.
    const Int exponent = (Int)(((Bits)amax + 0x1fffff) >> 23) - (127 + kTop) + 26;
    return smaller(larger(exponent, Int{}), Int{} + 31) << 3;
  }
  static Vec next_step(Vec, Vec scale) { return scale * (float)kNext; }
};
typedef FloatScale<8, 240> Fp8Scale;
typedef FloatScale<15, 32768> E5m2Scale;

template <bool kStochastic, class Kind>
inline void choose_scales(const int32_t* amax_bits, float largest, const uint64_t* words,
                          Scales& out) {
  const Int bits = load_lanes<Int>(amax_bits);
  const Vec amax = (Vec)bits;
  Int code = Kind::least(amax, largest);
  const Int below = larger(code - Kind::kStep, Int{});
  const Vec scale = (Vec)((code << kScaleShift) + kScaleBias);
  const Vec lower = (Vec)((below << kScaleShift) + kScaleBias);
  const Vec low = lower * largest, high = Kind::next_step(low, scale);
  const Int between = (code > below) & (amax > low) & (amax < high);
  const Vec odds = (amax - low) / (high - low);
  Int up;
  if (kStochastic) {
    uint32_t lows[kLanes], highs[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      lows[i] = (uint32_t)words[i];
      highs[i] = (uint32_t)(words[i] >> 32);
    }
    const Bits random = mixed_lanes(load_lanes<Bits>(lows) + kScaleCounter * kGolden32,
                                    load_lanes<Bits>(highs));
    up = to_floats((Int)(random >> 8)) * 0x1p-24f < odds;
  } else {
    up = odds >= 0.5f;
  }
  code = pick(between & ~up, below, code);
  const Vec chosen = (Vec)((code << kScaleShift) + kScaleBias);
  store(out.scale, chosen);
  store(out.inverse, 1.0f / chosen);
  store(out.amax, amax);
  store(out.low, low);
  store(out.high, high);
  store(out.stretch, (high - low) / (amax - low));
  code = pick(bits > kInfBits, Int{} + kNanScale, code);
  std::memcpy(out.code, &code, sizeof(code));
  const Int stretched = kStochastic ? between & up : Int{};
  std::memcpy(out.stretched, &stretched, sizeof(stretched));
}

inline Vec stretch(Vec v, const Scales& scales, int64_t i) {
  const Vec magnitude = (Vec)magnitude_bits(v);
  Vec wide = (magnitude - scales.low[i]) * scales.stretch[i] + scales.low[i];
  wide = pick(magnitude < scales.amax[i], wide, splat(scales.high[i]));
  wide = pick(magnitude > scales.low[i], wide, magnitude);
  return (Vec)((Int)wide | ((Int)v & kSignBit));
}

}  // namespace shardlab::SHARDLAB_ISA
