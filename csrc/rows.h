// Kernels over table rows, compiled once per instruction set (see dispatch.cpp).
//
// An arena is one span of bytes that holds the blocks of all shards of a rank. A block keeps the
// payloads of its rows together and their optimiser states together behind: row i's payload starts
// at row_offset + i * row_bytes, its state at state_offset + i * state_bytes. All sizes are int64.
#pragma once
#include <cstdint>

namespace shardlab {

struct Block {
  int64_t row_offset, row_bytes, state_offset, state_bytes, columns, rows;
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

// row_squares: mean square of every unique's gradient over its whole row, -1 where the block has all
// of the row's columns; or null.
struct RowKernels {
  void (*gather)(const char* arena, const Block* blocks, const GatherSegment* segments,
                 int64_t num_segments, const int64_t* ids, float* out, int threads);
  void (*pool)(const float* source, const PoolJob* jobs, int64_t num_jobs, const int64_t* index,
               const int64_t* offsets, const float* weights, float* out, int threads);
  void (*sum)(const float* source, const Csr& csr, const SumPiece* pieces, int64_t num_pieces,
              float scale, float* out, int threads);
  void (*update)(char* arena, const Block* blocks, int64_t num_blocks, const int64_t* ids,
                 const int64_t* splits, const Csr& csr, const float* grads,
                 const float* row_squares, Rule rule, const Step& step, int threads);
};

}  // namespace shardlab
