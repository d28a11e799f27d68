// Encodes, decodes and moves rows, sixteen at a time. Formats: docs/precision.md. Source: own.
#include "codecs.h"

#include <omp.h>

#include <algorithm>
#include <vector>

#include "encode.h"

namespace shardlab::SHARDLAB_ISA {
namespace {

// Rows ahead to prefetch when moving: two batches.
constexpr int64_t kAhead = 2 * kLanes;

// ---------------------------------------------------------------- decode
template <class Reader>
void decode_batch(const CodeBatch& batch) {
  for (int64_t i = 0; i < batch.count; ++i) {
    const auto row = Reader::open(batch.records[i], batch.columns);
    float* target = batch.values[i];
    int64_t c = 0;
    for (; c + kLanes <= batch.columns; c += kLanes) store(target + c, Reader::load(row, c));
    const int64_t rest = batch.columns - c;
    if (rest) store_part(target + c, Reader::load_part(row, c, rest), rest);
  }
}

// ---------------------------------------------------------------- encode: one element by itself
void encode_fp32_batch(const CodeBatch& batch) {
  for (int64_t i = 0; i < batch.count; ++i)
    std::memcpy(batch.records[i], batch.values[i], batch.columns * sizeof(float));
}

template <bool kStochastic, bool kBf16, bool kAligned>
void encode_short_rows(const CodeBatch& batch) {
  for (int64_t i = 0; i < batch.count; ++i) {
    RandomColumns<kAligned> columns(batch.words[i], batch.first);
    for_columns(batch.columns, [&](int64_t c, int lanes) SHARDLAB_INLINE {
      const Bits random = kStochastic ? columns.at(c) : Bits{};
      const Vec v = read(batch.values[i] + c, lanes);
      store_shorts(batch.records[i] + 2 * c,
                   kBf16 ? encode_bf16<kStochastic>(v, random)
                         : encode_fp16<kStochastic>(v, random),
                   lanes);
    });
  }
}

template <bool kStochastic, bool kBf16>
void encode_short_batch(const CodeBatch& batch) {
  with_alignment(batch.first, [&](auto aligned) {
    encode_short_rows<kStochastic, kBf16, aligned>(batch);
  });
}

// ---------------------------------------------------------------- encode: with a scale per row
struct Fp8 {
  typedef Fp8Scale Kind;
  static constexpr float kLargest = 448.0f;
  static int64_t code_bytes(int64_t columns) { return columns; }
  template <bool kStochastic>
  static void write(char* codes, int64_t c, int lanes, Vec v, float, float inverse, Bits random) {
    store_bytes(codes + c, encode_fp8<kStochastic>(v * inverse, random), lanes);
  }
};

struct E5m2 {
  typedef E5m2Scale Kind;
  static constexpr float kLargest = 57344.0f;
  static int64_t code_bytes(int64_t columns) { return columns; }
  template <bool kStochastic>
  static void write(char* codes, int64_t c, int lanes, Vec v, float, float inverse, Bits random) {
    store_bytes(codes + c, encode_fp8_e5m2<kStochastic>(v * inverse, random), lanes);
  }
};

struct Int8 {
  typedef IntScale Kind;
  static constexpr int kLargest = 127;
  static int64_t code_bytes(int64_t columns) { return columns; }
  template <bool kStochastic>
  static void write(char* codes, int64_t c, int lanes, Vec v, float scale, float inverse,
                    Bits random) {
    const Int q = quantise<kStochastic, kLargest>(v, scale, inverse, random);
    store_bytes(codes + c, narrow_to_bytes(q), lanes);
  }
};

// Low halves of eight bytes, side by side.
inline uint32_t pack_nibbles(uint64_t x) {
  x &= 0x0f0f0f0f0f0f0f0fu;
  x = (x | x >> 4) & 0x00ff00ff00ff00ffu;
  x = (x | x >> 8) & 0x0000ffff0000ffffu;
  return (uint32_t)(x | x >> 16);
}

struct Int4 {
  typedef IntScale Kind;
  static constexpr int kLargest = 7;
  static int64_t code_bytes(int64_t columns) { return (columns + 1) / 2; }
  template <bool kStochastic>
  static void write(char* codes, int64_t c, int lanes, Vec v, float scale, float inverse,
                    Bits random) {
    const Int q = quantise<kStochastic, kLargest>(v, scale, inverse, random);
    const Bytes bytes = narrow_to_bytes(q);
    uint64_t halves[2];
    std::memcpy(halves, &bytes, sizeof(halves));
    uint32_t packed[2] = {pack_nibbles(halves[0]), pack_nibbles(halves[1])};
    if (lanes % 2) ((char*)packed)[lanes / 2] &= 0x0f;  // the half beyond an odd row's end is zero
    std::memcpy(codes + c / 2, packed, (lanes + 1) / 2);
  }
};

inline int32_t largest_bits(const float* values, int64_t columns) {
  Int amax{};
  for_columns(columns, [&](int64_t c, int lanes) SHARDLAB_INLINE {
    amax = larger(amax, magnitude_bits(read(values + c, lanes)));
  });
  return reduce_max(amax);
}

template <bool kStochastic, class Format, bool kAligned>
void encode_scaled_rows(const CodeBatch& batch) {
  int32_t amax[kLanes] = {};
  for (int64_t i = 0; i < batch.count; ++i) amax[i] = largest_bits(batch.values[i], batch.columns);
  Scales scales;
  choose_scales<kStochastic, typename Format::Kind>(amax, Format::kLargest, batch.words, scales);
  for (int64_t i = 0; i < batch.count; ++i) {
    if (batch.next[i]) prefetch_write(batch.next[i], Format::code_bytes(batch.columns) + 1);
    char* codes = batch.records[i];
    const float scale = scales.scale[i], inverse = scales.inverse[i];
    const int64_t code_bytes = Format::code_bytes(batch.columns);
    codes[code_bytes] = (char)scales.code[i];
    if (scales.code[i] == kNanScale) {
      std::memset(codes, 0, code_bytes);
      continue;
    }
    RandomColumns<kAligned> columns(batch.words[i], batch.first);
    auto write = [&](int64_t c, int lanes, Vec v) SHARDLAB_INLINE {
      const Bits random = kStochastic ? columns.at(c) : Bits{};
      Format::template write<kStochastic>(codes, c, lanes, v, scale, inverse, random);
    };
    if (scales.stretched[i])
      for_columns(batch.columns, [&](int64_t c, int lanes) SHARDLAB_INLINE {
        write(c, lanes, stretch(read(batch.values[i] + c, lanes), scales, i));
      });
    else
      for_columns(batch.columns, [&](int64_t c, int lanes) SHARDLAB_INLINE {
        write(c, lanes, read(batch.values[i] + c, lanes));
      });
  }
}

template <bool kStochastic, class Format>
void encode_scaled_batch(const CodeBatch& batch) {
  with_alignment(batch.first, [&](auto aligned) {
    encode_scaled_rows<kStochastic, Format, aligned>(batch);
  });
}

}  // namespace

extern const CodecOps codec_ops[kCodecs] = {
    {decode_batch<Fp32Reader>, {encode_fp32_batch, encode_fp32_batch}},
    {decode_batch<ShortReader<false>>,
     {encode_short_batch<false, false>, encode_short_batch<true, false>}},
    {decode_batch<ShortReader<true>>,
     {encode_short_batch<false, true>, encode_short_batch<true, true>}},
    {decode_batch<ByteReader<false>>,
     {encode_scaled_batch<false, Fp8>, encode_scaled_batch<true, Fp8>}},
    {decode_batch<ByteReader<true>>,
     {encode_scaled_batch<false, Int8>, encode_scaled_batch<true, Int8>}},
    {decode_batch<Int4Reader>, {encode_scaled_batch<false, Int4>, encode_scaled_batch<true, Int4>}},
    {decode_batch<E5m2Reader>, {encode_scaled_batch<false, E5m2>, encode_scaled_batch<true, E5m2>}},
};

namespace {

// ---------------------------------------------------------------- whole matrices
template <class Body>
void for_batches(int64_t rows, int threads, const Body& body) {
#pragma omp parallel num_threads(threads)
  {
    const int64_t parts = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t end = rows * (me + 1) / parts;
    for (int64_t row = rows * me / parts; row < end; row += kLanes)
      body(row, std::min<int64_t>(kLanes, end - row));
  }
}

void encode(const RowCodes& codes, const float* values, char* records, const Rounding& rounding,
            int threads) {
  const auto run = codec_ops[(int64_t)codes.codec].encode[rounding.stochastic];
  for_batches(codes.rows, threads, [&](int64_t row, int64_t count) {
    CodeBatch batch{count, codes.columns, {}, {}, {}, part_counter(0, rounding.first_column), {}};
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = row + i;
      batch.values[i] = const_cast<float*>(values) + at * codes.value_step;
      batch.records[i] = records + at * codes.record_step;
      batch.words[i] = row_word(rounding.key, rounding.row_ids ? rounding.row_ids[at]
                                                               : rounding.first_row + at);
    }
    run(batch);
  });
}

void decode(const RowCodes& codes, const char* records, float* values, int threads) {
  const auto run = codec_ops[(int64_t)codes.codec].decode;
  for_batches(codes.rows, threads, [&](int64_t row, int64_t count) {
    CodeBatch batch{count, codes.columns, {}, {}, {}, 0, {}};
    for (int64_t i = 0; i < count; ++i) {
      batch.values[i] = values + (row + i) * codes.value_step;
      batch.records[i] = const_cast<char*>(records) + (row + i) * codes.record_step;
    }
    run(batch);
  });
}

// ---------------------------------------------------------------- moves
// One part of up to sixteen records: a payload, or a part of the state.
struct Part {
  Codec source_codec, target_codec;
  bool stochastic;
  int64_t columns;
  uint32_t first;
  char *source[kLanes], *target[kLanes];
};

void move_part(const Part& part, int64_t count, const uint64_t* words, float* scratch) {
  if (part.source_codec == part.target_codec) {
    const int64_t bytes = payload_bytes(part.source_codec, part.columns);
    for (int64_t i = 0; i < count; ++i) std::memcpy(part.target[i], part.source[i], bytes);
    return;
  }
  CodeBatch batch{count, part.columns, {}, {}, {}, part.first, {}};
  for (int64_t i = 0; i < count; ++i) {
    batch.values[i] = scratch + i * part.columns;
    batch.records[i] = part.source[i];
    batch.words[i] = words[i];
  }
  codec_ops[(int64_t)part.source_codec].decode(batch);
  std::copy(part.target, part.target + count, batch.records);
  codec_ops[(int64_t)part.target_codec].encode[part.stochastic](batch);
}

// Element-wise parts of the state, then the row's own elements, which have no column.
template <class Body>
void for_state_parts(const Encoding& encoding, int64_t columns, const Body& body) {
  for (int64_t p = 0; p < encoding.element_states; ++p)
    body(p * columns, columns, part_counter(p + 1, encoding.col_start));
  if (encoding.row_states)
    body(encoding.element_states * columns, encoding.row_states,
         part_counter(encoding.element_states + 1, 0));
}

void move_segment(const MoveEnd& source, const MoveEnd& target, const MoveSegment& segment,
                  int64_t begin, int64_t end, uint64_t key, const int64_t* row_ids) {
  const Block& from = source.arena.blocks[segment.source_block];
  const Block& to = target.arena.blocks[segment.target_block];
  const Encoding &from_code = source.arena.encodings[segment.source_block],
                 &to_code = target.arena.encodings[segment.target_block];
  const int64_t columns = to.columns;
  std::vector<float> scratch(kLanes * std::max<int64_t>(columns, to_code.row_states));
  const auto record = [](const MoveEnd& side, const Block& block, int64_t at) {
    return side.arena.bytes + block.row_offset + side.places[at] * block.row_bytes;
  };
  const auto state = [](const MoveEnd& side, const Block& block, int64_t at) {
    return side.arena.bytes + block.state_offset + side.places[at] * block.state_bytes;
  };
  for (int64_t at = begin; at < end; at += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, end - at);
    for (int64_t i = at + kAhead; i < std::min(at + kAhead + kLanes, end); ++i) {
      prefetch_read(record(source, from, i), from.row_bytes);
      prefetch_write(record(target, to, i), to.row_bytes);
      prefetch_read(state(source, from, i), from.state_bytes);
      prefetch_write(state(target, to, i), to.state_bytes);
    }
    uint64_t words[kLanes];
    Part part{(Codec)from_code.codec, (Codec)to_code.codec, to_code.stochastic != 0, columns,
              part_counter(0, to_code.col_start), {}, {}};
    for (int64_t i = 0; i < count; ++i) {
      words[i] = row_word(key ^ (uint64_t)to_code.table_key,
                          row_ids ? row_ids[at + i] : to_code.row_start + target.places[at + i]);
      part.source[i] = record(source, from, at + i);
      part.target[i] = record(target, to, at + i);
    }
    move_part(part, count, words, scratch.data());
    part.source_codec = (Codec)from_code.state_codec;
    part.target_codec = (Codec)to_code.state_codec;
    for_state_parts(to_code, columns, [&](int64_t element, int64_t width, uint32_t first) {
      part.columns = width;
      part.first = first;
      for (int64_t i = 0; i < count; ++i) {
        part.source[i] = state(source, from, at + i) + payload_bytes(part.source_codec, element);
        part.target[i] = state(target, to, at + i) + payload_bytes(part.target_codec, element);
      }
      move_part(part, count, words, scratch.data());
    });
  }
}

void move(const MoveEnd& source, const MoveEnd& target, const MoveSegment* segments,
          int64_t num_segments, uint64_t key, const int64_t* row_ids, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const int64_t parts = omp_get_num_threads(), me = omp_get_thread_num();
    for (int64_t s = 0; s < num_segments; ++s) {
      const MoveSegment& segment = segments[s];
      const int64_t begin = segment.start + segment.count * me / parts;
      const int64_t end = segment.start + segment.count * (me + 1) / parts;
      if (begin < end) move_segment(source, target, segment, begin, end, key, row_ids);
    }
  }
}

}  // namespace

extern const CodecKernels codec_kernels{encode, decode, move};

}  // namespace shardlab::SHARDLAB_ISA
