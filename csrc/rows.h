// Kernels over table rows, compiled once per instruction set (see dispatch.cpp).
//
// An arena is one span of bytes that holds the blocks of all shards of a rank. Row i of a block has
// its payload at row_offset + i * row_bytes and its optimiser state at state_offset + i *
// state_bytes. In memory a block keeps payloads together and states together behind them; side by
// side, both steps are the record's bytes. All sizes are int64.
#pragma once
#include <cstdint>

namespace shardlab {

struct Block {
  int64_t row_offset, row_bytes, state_offset, state_bytes, columns, rows;
};

enum class Codec : int64_t { kFp32, kFp16, kBf16, kFp8, kInt8, kInt4, kFp8E5m2 };
constexpr int64_t kCodecs = 7;

// How the rows of a block are held, beside its Block. States are fp32, fp16 or bf16. The state of
// a row is `element_states` parts of `columns` elements, then `row_states` single elements. Random
// bits of a row are those of (table_key, row_start + its number, col_start + its column).
struct Encoding {
  int64_t codec, state_codec, element_states, row_states, row_start, col_start, table_key,
      stochastic;
};

// encodings: one per block, or null where all is fp32.
struct Arena {
  char* bytes;
  const Block* blocks;
  const Encoding* encodings;
  int64_t num_blocks;
};

// Copy rows ids[start .. start+count) of `block` to out + out_start (in elements), densely.
struct GatherSegment {
  int64_t block, start, count, out_start;
};

// Bags of one feature: bag b is the positions [offsets[first_bag + b], offsets[first_bag + b + 1]),
// or [first + b * length, ...) when length >= 0. Row of position p: source + base + index[p] * step
// (in elements); a negative index is skipped. Bag b is written to out + out_start + b * out_step.
struct PoolJob {
  int64_t base, step, columns, bags, first, first_bag, length, mean, out_start, out_step, add;
};

// The same with base and step in bytes, from rows of a codec.
struct EncodedPoolJob {
  PoolJob job;
  int64_t codec;
};

// Sums of uniques [start, start+count): out + out_start + i * out_step = scale * sum over the CSR
// entries k of weights[k] * source[sources[k] + shift .. + columns).
struct SumPiece {
  int64_t start, count, columns, shift, out_start, out_step;
};

struct Csr {
  const int64_t* starts;   // [uniques + 1]
  const int64_t* sources;  // element offsets into the gradient buffer
  const float* weights;    // per entry, or null
};

enum class Rule : int64_t { kSgd, kAdagrad, kRowWiseAdagrad, kAdam, kRowWiseAdam };

struct Step {
  // rest1, rest2: 1 - beta, bias1, bias2: 1 - beta^t, all computed in double by the caller.
  float lr, eps, beta1, beta2, rest1, rest2, weight_decay, scale, clip_value, bias1, bias2;
};

// What an update steps: rows ids[splits[b]:splits[b + 1]] of block b.
struct Updates {
  const int64_t *ids, *splits;
  Csr csr;
  const float* grads;
  // Mean square of every unique's gradient over its whole row, -1 where the block has all of the
  // row's columns; or null.
  const float* row_squares;
  // Of the random bits: key of (seed, step), rows of the whole table; null: row_start + id.
  uint64_t key;
  const int64_t* row_ids;
};

struct RowKernels {
  void (*gather)(const Arena& arena, const GatherSegment* segments, int64_t num_segments,
                 const int64_t* ids, float* out, int threads);
  void (*pool)(const float* source, const PoolJob* jobs, int64_t num_jobs, const int64_t* index,
               const int64_t* offsets, const float* weights, float* out, int threads);
  void (*pool_encoded)(const char* source, const EncodedPoolJob* jobs, int64_t num_jobs,
                       const int64_t* index, const int64_t* offsets, const float* weights,
                       float* out, int threads);
  void (*sum)(const float* source, const Csr& csr, const SumPiece* pieces, int64_t num_pieces,
              float scale, float* out, int threads);
  void (*update)(const Arena& arena, const Updates& updates, Rule rule, const Step& step,
                 int threads);
};

}  // namespace shardlab
