// Reads and steps of rows whose chunks lie in a pool, compiled once per instruction set.
#pragma once
#include "chunk_store.h"
#include "rows.h"

namespace shardlab {

// What to read: `ChunkSegment`s. With entries, rows go to the places of these; without, a segment has
// a fourth number, and its rows go to out + that, one behind the other.
struct ChunkReads {
  const int64_t* numbers;
  int64_t count, width;

  ChunkSegment segment(int64_t r) const { return *(const ChunkSegment*)(numbers + r * width); }
  int64_t out_start(int64_t r) const { return width > 3 ? numbers[r * width + 3] : 0; }
};

// What a step tells of utilities, and of absent chunks.
struct ChunkGains {
  const float* weights;  // of the step, by block
  uint64_t key;          // of the random bits of utilities; those of chunks are of `Updates::key`
  float* norms;          // [uniques, stride]: of absent chunks, times accesses; -1 where one is present
  int64_t stride;
  // [blocks, absent_stride], or null: adds the scaled gradients of the absent chunks of blocks where
  // these are shared, by column, then how many there are of every chunk.
  float* absent;
  int64_t absent_stride;
  const int64_t* slots;  // [uniques], where a read found them and the index is still the same; or null
  const float* shares;  // by block: of the rows whose absent chunks count, by chance, for as many; 1: all
};

// A chunk that was admitted: unique, chunk of its row, place.
struct AdmittedChunk {
  int64_t unique, chunk, place;
};
// Ascending. written [blocks], or null: places of these blocks hold what chunks start from already;
// those of others are cleared.
struct Admissions {
  const AdmittedChunk* chunks;
  int64_t count;
  const bool* written;
};

// Of the arena, block b is shard b's share of its store's pool: columns are those of a chunk.
struct ChunkKernels {
  // slots [ids]: which were found, -1 where no chunk is present; or null.
  void (*read)(const ChunkCall& call, const Arena& arena, const ChunkReads& reads,
               const int64_t* ids, const Csr* entries, int64_t* slots, float* out, int threads);
  // Steps present chunks and adds to their utilities.
  void (*update)(const ChunkCall& call, const Arena& arena, const Updates& updates, Rule rule,
                 const Step& step, const ChunkGains& gains, int threads);
  // The first step of admitted chunks, from fresh states.
  void (*admit)(const ChunkCall& call, const Arena& arena, const Updates& updates, Rule rule,
                const Step& step, const Admissions& admitted, int threads);
};

}  // namespace shardlab
