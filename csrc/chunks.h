// Reads and steps of rows whose chunks lie in a pool, compiled once per instruction set.
#pragma once
#include "chunk_store.h"
#include "rows.h"

namespace shardlab {

// Rows ids[start, start + count) of a block. Without entries, row i goes to out + out_start, one
// behind the other; with entries, to the places of its entries.
struct ChunkRead {
  int64_t block, start, count, out_start;
};

// Of the arena, block b is shard b's share of its store's pool: columns are those of a chunk.
struct ChunkKernels {
  void (*read)(const ChunkCall& call, const Arena& arena, const ChunkRead* reads,
               int64_t num_reads, const int64_t* ids, const Csr* entries, float* out, int threads);
  // Steps present chunks and adds to their utilities. norms [uniques, stride]: of absent chunks,
  // times accesses; -1 where a chunk is present. Random bits of utilities are those of
  // `utility_key`, of chunks those of `updates.key`.
  void (*update)(const ChunkCall& call, const Arena& arena, const Updates& updates, Rule rule,
                 const Step& step, const float* weights, uint64_t utility_key, float* norms,
                 int64_t stride, int threads);
  // The first step of admitted chunks, [count, 3]: (unique, chunk, place), ascending.
  void (*admit)(const ChunkCall& call, const Arena& arena, const Updates& updates, Rule rule,
                const Step& step, const int64_t* admitted, int64_t count, int threads);
};

}  // namespace shardlab
