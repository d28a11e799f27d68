// How an update reaches the rows of a block: the Rows that rules.h steps, one class per kind.
#pragma once
#include <algorithm>
#include <vector>

#include "encode.h"
#include "rules.h"

namespace shardlab::SHARDLAB_ISA {

// A Rows class, as rules.h wants it, opens a batch of rows and closes it. All of them know where
// the records of a block are.
class Records {
 public:
  Records(const Arena& arena, int64_t b, const Updates& updates, int64_t end)
      : block(arena.blocks[b]),
        ids_(updates.ids),
        rows_(arena.bytes + block.row_offset),
        states_(arena.bytes + block.state_offset),
        row_bytes_(block.row_bytes),
        state_bytes_(block.state_bytes),
        end_(end) {
    if (!arena.encodings) return;
    const Encoding& code = arena.encodings[b];
    const int64_t elements = code.element_states * block.columns + code.row_states;
    row_bytes_ = payload_bytes((Codec)code.codec, block.columns);
    state_bytes_ = payload_bytes((Codec)code.state_codec, elements);
  }

  // Unique u of the update.
  char* row(int64_t u) const { return rows_ + ids_[u] * block.row_bytes; }
  char* state(int64_t u) const { return states_ + ids_[u] * block.state_bytes; }
  // Of the first batch, and then of row i of the next.
  SHARDLAB_INLINE void prefetch_first(int64_t first) {
    first_ = first - kLanes;
    for (int64_t i = 0; i < kLanes; ++i) {
      prefetch_row(i);
      prefetch_state(i);
    }
  }
  SHARDLAB_INLINE void prefetch_row(int64_t i) const {
    if (next(i) < end_) prefetch_write(row(next(i)), row_bytes_);
  }
  SHARDLAB_INLINE void prefetch_state(int64_t i) const {
    if (next(i) < end_) prefetch_write(state(next(i)), state_bytes_);
  }

  const Block& block;

 protected:
  int64_t next(int64_t i) const { return first_ + kLanes + i; }

  const int64_t* ids_;
  char *rows_, *states_;
  int64_t row_bytes_, state_bytes_, end_, first_ = 0;
};

struct Fp32Row {
  float* values;
  Vec read(int64_t c, int lanes) const { return SHARDLAB_ISA::read(values + c, lanes); }
  void write(int64_t c, Vec v, int lanes) const { write_lanes(values + c, v, lanes); }
};

// fp32 rows and states are stepped where they lie.
class InPlace : public Records {
 public:
  using Records::Records;
  Fp32Row operator[](int64_t i) const { return {(float*)row(first_ + i)}; }
  void open(Batch& batch, int64_t first) {
    first_ = first;
    for (int64_t i = 0; i < batch.count; ++i) batch.state[i] = (float*)state(first + i);
  }
  void close(const Batch&) {}
};

// Random words of a batch's rows, and its states: fp32 where they lie, others decoded to fp32 in
// the first-level cache and encoded to their place.
class Encoded : public Records {
 public:
  Encoded(const Arena& arena, int64_t b, const Updates& updates, int64_t end)
      : Records(arena, b, updates, end),
        code_(arena.encodings[b]),
        updates_(updates),
        state_columns_(code_.element_states * block.columns + code_.row_states),
        state_scratch_((Codec)code_.state_codec == Codec::kFp32 ? 0 : kLanes * state_columns_) {}

  void open(Batch& batch, int64_t first) {
    first_ = first;
    const uint64_t key = updates_.key ^ (uint64_t)code_.table_key;
    for (int64_t i = 0; i < batch.count; ++i) {
      words_[i] = row_word(key, updates_.row_ids ? updates_.row_ids[first + i]
                                                 : code_.row_start + ids_[first + i]);
      batch.state[i] = state_scratch_.empty() ? (float*)state(first + i)
                                              : state_scratch_.data() + i * state_columns_;
    }
    if (!state_scratch_.empty())
      ops(code_.state_codec).decode(state_part(batch, 0, state_columns_));
  }

  void close(const Batch& batch) {
    if (state_scratch_.empty()) return;
    // Parts of the state have counters of their own; a row's single elements have no column.
    for (int64_t part = 0; part <= code_.element_states; ++part) {
      const bool single = part == code_.element_states;
      CodeBatch codes = state_part(batch, part * block.columns,
                                   single ? code_.row_states : block.columns);
      codes.first = part_counter(part + 1, single ? 0 : code_.col_start);
      ops(code_.state_codec).encode[code_.stochastic](codes);
    }
  }

 protected:
  static const CodecOps& ops(int64_t codec) { return codec_ops[codec]; }

  CodeBatch state_part(const Batch& batch, int64_t element, int64_t columns) const {
    CodeBatch codes{batch.count, columns, {}, {}, {}, 0, {}};
    const int64_t offset = payload_bytes((Codec)code_.state_codec, element);
    for (int64_t i = 0; i < batch.count; ++i) {
      codes.values[i] = batch.state[i] + element;
      codes.records[i] = state(first_ + i) + offset;
      codes.words[i] = words_[i];
    }
    return codes;
  }

  const Encoding& code_;
  const Updates& updates_;
  int64_t state_columns_;
  std::vector<float> state_scratch_;
  uint64_t words_[kLanes];
};

// fp32 rows with states of another precision.
class Fp32Rows : public Encoded {
 public:
  using Encoded::Encoded;
  Fp32Row operator[](int64_t i) const { return {(float*)row(first_ + i)}; }
};

// Elements that stand for themselves are decoded, stepped and encoded in registers.
template <bool kBf16, bool kStochastic, bool kAligned = true>
class ShortRows : public Encoded {
 public:
  struct Row {
    char* record;
    RandomColumns<kAligned> columns;

    SHARDLAB_INLINE Vec read(int64_t c, int lanes) const {
      return ShortReader<kBf16>::load_part(record, c, lanes);
    }
    SHARDLAB_INLINE void write(int64_t c, Vec v, int lanes) {
      const Bits random = kStochastic ? columns.at(c) : Bits{};
      store_shorts(record + 2 * c,
                   kBf16 ? encode_bf16<kStochastic>(v, random)
                         : encode_fp16<kStochastic>(v, random),
                   lanes);
    }
  };

  using Encoded::Encoded;
  Row operator[](int64_t i) const {
    return {row(first_ + i), {words_[i], part_counter(0, code_.col_start)}};
  }
};

// Rows with a scale: it is known when the whole row is, so they are stepped to fp32 in the
// first-level cache first.
template <class Reader>
class ScaledRows : public Encoded {
 public:
  struct Row {
    typename Reader::Row record;
    float* values;

    SHARDLAB_INLINE Vec read(int64_t c, int lanes) const {
      return lanes == kLanes ? Reader::load(record, c) : Reader::load_part(record, c, lanes);
    }
    void write(int64_t c, Vec v, int lanes) const { write_lanes(values + c, v, lanes); }
  };

  ScaledRows(const Arena& arena, int64_t b, const Updates& updates, int64_t end)
      : Encoded(arena, b, updates, end), scratch_(kLanes * block.columns) {}

  Row operator[](int64_t i) const {
    return {Reader::open(codes_.records[i], block.columns), codes_.values[i]};
  }
  void open(Batch& batch, int64_t first) {
    Encoded::open(batch, first);
    codes_.count = batch.count;
    codes_.columns = block.columns;
    codes_.first = part_counter(0, code_.col_start);
    for (int64_t i = 0; i < batch.count; ++i) {
      codes_.values[i] = scratch_.data() + i * block.columns;
      codes_.records[i] = row(first + i);
      codes_.words[i] = words_[i];
      codes_.next[i] = next(i) < end_ ? row(next(i)) : nullptr;
    }
  }
  // Encoding takes longest: the next batch is fetched then.
  SHARDLAB_INLINE void prefetch_row(int64_t) const {}
  void close(const Batch& batch) {
    ops(code_.codec).encode[code_.stochastic](codes_);
    Encoded::close(batch);
  }

 private:
  std::vector<float> scratch_;
  CodeBatch codes_;
};

template <bool kBf16, class Run>
void with_short_rows(const Arena& arena, int64_t b, const Updates& updates, int64_t end,
                     const Run& run) {
  const Encoding& code = arena.encodings[b];
  if (!code.stochastic) return run(ShortRows<kBf16, false>(arena, b, updates, end));
  with_alignment(code.col_start, [&](auto aligned) {
    run(ShortRows<kBf16, true, aligned>(arena, b, updates, end));
  });
}

// Calls run(rows) with the class that a block wants; `end` bounds the uniques to look ahead to.
template <class Run>
void with_rows(const Arena& arena, int64_t b, const Updates& updates, int64_t end, const Run& run) {
  if (!arena.encodings) return run(InPlace(arena, b, updates, end));
  const Encoding& code = arena.encodings[b];
  switch ((Codec)code.codec) {
    case Codec::kFp32:
      if ((Codec)code.state_codec == Codec::kFp32) return run(InPlace(arena, b, updates, end));
      return run(Fp32Rows(arena, b, updates, end));
    case Codec::kFp16: return with_short_rows<false>(arena, b, updates, end, run);
    case Codec::kBf16: return with_short_rows<true>(arena, b, updates, end, run);
    case Codec::kFp8: return run(ScaledRows<ByteReader<false>>(arena, b, updates, end));
    case Codec::kInt8: return run(ScaledRows<ByteReader<true>>(arena, b, updates, end));
    case Codec::kInt4: return run(ScaledRows<Int4Reader>(arena, b, updates, end));
    case Codec::kFp8E5m2: return run(ScaledRows<E5m2Reader>(arena, b, updates, end));
  }
}

}  // namespace shardlab::SHARDLAB_ISA
