// Reads rows of any codec sixteen lanes at a time. A reader opens a record and loads lanes of it:
//
//   Row open(const char* record, int64_t columns)
//   Vec load(Row, int64_t column)                        sixteen columns
//   Vec load_part(Row, int64_t column, int64_t lanes)    fewer; the other lanes are unspecified
//
// Formats and their sources: docs/precision.md.
#pragma once
#include "codecs.h"
#include "lanes.h"

namespace shardlab::SHARDLAB_ISA {

// ---------------------------------------------------------------- scales
// A scale is one byte: 5 bits of exponent, 3 of mantissa, 2^-26 ... 56; 255 marks a row with a NaN.
constexpr int32_t kScaleShift = 20, kScaleBias = 101 << 23, kNanScale = 255, kTopScale = 254;

inline float decode_scale(uint8_t code) {
  return as_float(code == kNanScale ? 0x7fc00000 : (code << kScaleShift) + kScaleBias);
}

// ---------------------------------------------------------------- sixteen codes to fp32
inline Vec decode_fp16(Shorts codes) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps((__m256i)codes);
#elif defined(__F16C__)
  return {_mm256_cvtph_ps(_mm256_castsi256_si128((__m256i)codes)),
          _mm256_cvtph_ps(_mm256_extracti128_si256((__m256i)codes, 1))};
#else
  // The fp16 exponent and fraction as those of an fp32 number 2^112 times too small.
  const Bits bits = widen(codes), magnitude = (bits & 0x7fffu) << 13;
  const Int finite = (Int)((Vec)magnitude * as_float((127 + 112) << 23));
  const Int value =
      pick((Int)magnitude < (0x7c00 << 13), finite, (Int)(magnitude | 0x7f800000u));
  return (Vec)((Bits)value | (bits & 0x8000u) << 16);
#endif
}

inline Vec decode_bf16(Shorts codes) {
  return (Vec)(widen(codes) << 16);
}

// e4m3 is read as fp16 with another exponent bias: 2^8 times too small.
constexpr float kFp8InFp16 = 256.0f;
inline Vec decode_fp8(Bytes codes) {
  const Shorts wide = widen(codes);
  return decode_fp16((wide & 0x7f) << 7 | (wide & 0x80) << 8);
}

// e5m2 is the upper half of fp16.
inline Vec decode_fp8_e5m2(Bytes codes) { return decode_fp16(widen(codes) << 8); }

inline Vec decode_int8(Bytes codes) {
  return to_floats(widen_signed(codes));
}

// Column 2 j is the low half of byte j.
inline Vec decode_int4(uint64_t nibbles) {
  static constexpr int32_t kToTop[kLanes] = {28, 24, 20, 16, 12, 8, 4, 0,
                                             28, 24, 20, 16, 12, 8, 4, 0};
  static constexpr int32_t kFirst[kLanes] = {-1, -1, -1, -1, -1, -1, -1, -1};
  const Int low = Int{} + (int32_t)nibbles, high = Int{} + (int32_t)(nibbles >> 32);
  const Int word = pick(load_lanes<Int>(kFirst), low, high);
  return to_floats(word << load_lanes<Int>(kToTop) >> 28);
}

// ---------------------------------------------------------------- readers
struct Fp32Reader {
  typedef const float* Row;
  static constexpr Codec kCodec = Codec::kFp32;
  static Row open(const char* record, int64_t) { return (const float*)record; }
  static Vec load(Row row, int64_t c) { return SHARDLAB_ISA::load(row + c); }
  static Vec load_part(Row row, int64_t c, int64_t n) {
    return SHARDLAB_ISA::load_part(row + c, n);
  }
};

template <bool kBf16>
struct ShortReader {
  typedef const char* Row;
  static constexpr Codec kCodec = kBf16 ? Codec::kBf16 : Codec::kFp16;
  static Row open(const char* record, int64_t) { return record; }
  static Vec load(Row row, int64_t c) { return load_part(row, c, kLanes); }
  static Vec load_part(Row row, int64_t c, int64_t n) {
    const Shorts codes = load_shorts(row + 2 * c, n);
    return kBf16 ? decode_bf16(codes) : decode_fp16(codes);
  }
};

template <bool kInt>
struct ByteReader {
  struct Row {
    const char* codes;
    float scale;
  };
  static constexpr Codec kCodec = kInt ? Codec::kInt8 : Codec::kFp8;
  static Row open(const char* record, int64_t columns) {
    const float scale = decode_scale((uint8_t)record[columns]);
    return {record, kInt ? scale : scale * kFp8InFp16};
  }
  static Vec load(Row row, int64_t c) { return load_part(row, c, kLanes); }
  static Vec load_part(Row row, int64_t c, int64_t n) {
    const Bytes codes = load_bytes(row.codes + c, n);
    return (kInt ? decode_int8(codes) : decode_fp8(codes)) * row.scale;
  }
};

struct E5m2Reader {
  typedef ByteReader<true>::Row Row;
  static constexpr Codec kCodec = Codec::kFp8E5m2;
  static Row open(const char* record, int64_t columns) {
    return {record, decode_scale((uint8_t)record[columns])};
  }
  static Vec load(Row row, int64_t c) { return load_part(row, c, kLanes); }
  static Vec load_part(Row row, int64_t c, int64_t n) {
    return decode_fp8_e5m2(load_bytes(row.codes + c, n)) * row.scale;
  }
};

struct Int4Reader {
  struct Row {
    const char* codes;
    float scale;
  };
  static constexpr Codec kCodec = Codec::kInt4;
  static Row open(const char* record, int64_t columns) {
    return {record, decode_scale((uint8_t)record[(columns + 1) / 2])};
  }
  static Vec load(Row row, int64_t c) {
    uint64_t nibbles;
    std::memcpy(&nibbles, row.codes + c / 2, sizeof(nibbles));
    return decode_int4(nibbles) * row.scale;
  }
  static Vec load_part(Row row, int64_t c, int64_t n) {
    uint64_t nibbles = 0;
    std::memcpy(&nibbles, row.codes + c / 2, (n + 1) / 2);
    return decode_int4(nibbles) * row.scale;
  }
};

// Calls body(reader) for a codec's reader.
template <class Body>
inline void with_reader(Codec codec, const Body& body) {
  switch (codec) {
    case Codec::kFp32: return body(Fp32Reader{});
    case Codec::kFp16: return body(ShortReader<false>{});
    case Codec::kBf16: return body(ShortReader<true>{});
    case Codec::kFp8: return body(ByteReader<false>{});
    case Codec::kInt8: return body(ByteReader<true>{});
    case Codec::kInt4: return body(Int4Reader{});
    case Codec::kFp8E5m2: return body(E5m2Reader{});
  }
}

// ---------------------------------------------------------------- batches of rows
// Up to sixteen rows: their scales, square roots and divisions are taken at once.
struct CodeBatch {
  int64_t count, columns;
  float* values[kLanes];
  char* records[kLanes];
  uint64_t words[kLanes];  // row words (random.h); encode only
  uint32_t first;          // random counter of the first column
  // Records to prefetch while these are encoded, a row at a time; null for none.
  const char* next[kLanes];
};

struct CodecOps {
  void (*decode)(const CodeBatch& batch);
  void (*encode[2])(const CodeBatch& batch);  // nearest, stochastic
};
extern const CodecOps codec_ops[kCodecs];

// Random counters of a row: its columns, then the parts of its state, then its scale.
constexpr int kPartBits = 28;
constexpr uint32_t kScaleCounter = 0xffffffefu;
inline uint32_t part_counter(int64_t part, int64_t column) {
  return (uint32_t)(part << kPartBits) + (uint32_t)column;
}

}  // namespace shardlab::SHARDLAB_ISA
