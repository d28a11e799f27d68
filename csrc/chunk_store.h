// Pruned tables: which chunks of which rows are present, where they lie, and what they are worth.
//
// A store holds the rows of several shards whose rows have K chunks of one size. Its index is an
// array sorted by hash, with gaps: a row's slot is the first one from floor(hash * slots / 2^64) on
// that holds its hash, and no hash behind a greater one or a gap. The hash is a bijection of (shard,
// row), so it is the key itself: of 32 bits where the rows of a store can be numbered with them, else
// of 64. Sorted, the array grows and shrinks in place, in two passes over
// it, and a miss ends as early as a hit. A slot carries K places in the pool of chunks (-1: absent)
// and K utilities. Where K is 1 these lie behind the key, so that a row is found in one run of
// lines; else in an array of their own, so that keys of several rows share a line.
//
// The pool hands out places from a stack of free ones, the most recently freed first, and takes
// slabs of new ones while the budget lasts. The first places are never handed out: there lie the
// chunks that absent ones of a shard read as, where these are not zeros. Utilities of absent chunks are counted in a sketch:
// a count-min sketch of two cells a chunk, both in the row's cache line, with conservative update.
//
// Source: virtually hashed, physically indexed storage of arXiv 2401.04408; ordered linear probing
// (Amble and Knuth 1974); count-min sketch with conservative update (Estan and Varghese 2002).
#pragma once
#include <cstdint>

namespace shardlab {

struct ChunkStore {
  // Addresses: keys [span] and values [span], at their strides, payloads and states (0 where another device has
  // them: the caller then moves chunks), int32 stack, sketch lines.
  int64_t keys, values, payload, state, stack, sketch;
  int64_t chunks, payload_bytes, state_bytes, slab, max_chunks, max_slots, sketch_lines, wide,
      shared, key_bytes, key_stride, value_stride;
  // Of so many slots at most all but one are taken.
  int64_t load;
  // Address of a byte a line of the sketch, set where cells change but by decay; 0: nobody asks.
  int64_t line_marks;
  // What moves.
  int64_t budget, slots, rows, used, top, committed, free, refused;
};

// A shard: number of its store; where it lies in its table, in rows and in chunks; chunks of a row
// of the table; key of the table's random bits; place of what its first chunk reads as where it is
// absent, the others' behind it, -1 for zeros; rows of the shards before it in its store.
struct ChunkBlock {
  int64_t store, row_start, first_chunk, table_chunks, table_key, shared, rows_before;
};

// Rows ids[start, start + count) of a block.
struct ChunkSegment {
  int64_t block, start, count;
};

constexpr int64_t kUtilityBins = 256;
// Bit of a present chunk's utility, which is never negative: its row was stepped, admitted or lost a
// chunk to another one since marks were cleared. All chunks of a row have it, or none has.
constexpr uint16_t kMarked = 0x8000;
// What `chunk_between` lists.
enum class Marks : int64_t { kAny, kSet, kClear };

// Rows that lose chunks, as they were: [.., stride] (block, row, chunks left, value as slots hold
// it).
struct ChunkLog {
  int64_t* rows;
  int64_t stride;
  int64_t count;
};

struct ChunkCall {
  ChunkStore* stores;
  const ChunkBlock* blocks;
  int64_t num_blocks;
};

// What update hands to the index: chunk norms of every row, and how they count.
struct ChunkOffers {
  const ChunkSegment* segments;
  int64_t num_segments;
  const int64_t* ids;
  const float* norms;      // [n, stride]: times accesses; negative: not offered
  int64_t stride;
  const float* weights;    // of the step, by block: utilities are as of the last decision
  const float* thresholds; // of admission, by block
  uint64_t key;            // of the random bits of rounding
  const float* margins;    // by block: how many times the utility of a chunk that it replaces
  int64_t* evicted;        // by block: chunks that were replaced are added
  ChunkLog* log;           // of rows whose chunks were replaced; or null
};

int64_t chunk_held_bytes(const ChunkStore& store);
// Slots of every row, -1 where no chunk is present.
void chunk_find(const ChunkCall& call, const ChunkSegment* segments, int64_t num_segments,
                const int64_t* ids, int64_t* slots, int threads);
// places[k * stride + i]: place of chunk k of row ids[i], -1 where absent.
void chunk_places(const ChunkCall& call, const ChunkSegment* segments, int64_t num_segments,
                  const int64_t* ids, int64_t stride, int64_t* places, int threads);
// Adds to the utilities of present chunks.
void chunk_touch(const ChunkCall& call, const ChunkOffers& offers, int threads);
// Counts absent chunks in the sketch, and admits those above the threshold: while there is room, and
// then in place of the least useful chunk of a few rows drawn by chance, or, where slots are short, of
// the row whose best chunk is least, if that is worth less. What went is counted behind all offers.
// admitted: [.., 3] (row number among the offers, chunk, place). Returns how many.
int64_t chunk_offer(const ChunkCall& call, const ChunkOffers& offers, int64_t* admitted);
// Rows whose keys lie in one of as many equal slices.
struct ChunkSlice {
  int64_t number, slices;
};
// Utilities of present chunks by bin, and rows by chunks present: adds to bins [blocks][256] and
// dims [blocks][max_chunks + 1].
void chunk_count(const ChunkCall& call, int64_t store, const ChunkSlice& slice, float decay,
                 int64_t* bins, int64_t* dims, int64_t dims_stride);
// Decays all utilities and evicts what is below its block's threshold. evicted: [blocks]. log: of
// rows that lose chunks, with room for all rows and one; or null.
void chunk_decide(const ChunkCall& call, int64_t store, float decay, const float* thresholds,
                  uint64_t key, int64_t* evicted, ChunkLog* log);
// Moves chunks to the lowest places, gives the index the size of its rows, and slabs back: all that
// are empty (tight), or those that the budget has no room for. moves: [store.free, 2] places
// (from, to), or null. Returns how many moved.
int64_t chunk_compact(ChunkStore& store, bool tight, int64_t* moves);
// Replaces the index by n rows sorted by key; values as slots hold them, one behind the other.
void chunk_load(ChunkStore& store, const uint64_t* keys, const char* values, int64_t n);
// Takes rows in while there is room. places [n, chunks]: any number from 0 on where a chunk is
// wanted; replaced by its place, or -1. utilities [n, chunks]: bf16.
void chunk_insert(const ChunkCall& call, int64_t block, const int64_t* rows, int64_t n,
                  int32_t* places, const uint16_t* utilities);
// Rows of a block, in the order of their hashes; values as slots hold them. Returns how many.
int64_t chunk_list(const ChunkCall& call, int64_t block, int64_t* rows, char* values);
// Places [n, chunks], -1 where absent, and utilities with marks [n, chunks] of rows of a block.
void chunk_get(const ChunkCall& call, int64_t block, const int64_t* rows, int64_t n,
               int32_t* places, uint16_t* utilities);
// What `chunk_between` looks for: rows [low, high) of a block (-1: of all) whose hashes lie in slice
// `slice` of `slices`.
struct ChunkRange {
  int64_t block, low, high, slice, slices;
  Marks marks;
};
// (block, row) of rows of a store, in no order of use. Returns how many.
int64_t chunk_between(const ChunkCall& call, int64_t store, const ChunkRange& range,
                      int64_t* found);
// Clears the marks of all rows, and of the sketch.
void chunk_unmark(const ChunkStore& store);

// Decisions that were taken, to take them again away from the index.
struct ChunkDecisions {
  const float *decays, *thresholds;
  const int64_t* keys;
  int64_t count;
};
// Utilities [n, chunks] of rows of a table after decisions, as `chunk_decide` leaves them, -1 for
// chunks that are absent or went. block: row_start 0, first_chunk, table_chunks and table_key count.
void chunk_redecide(const ChunkBlock& block, const ChunkDecisions& decisions, const int64_t* rows,
                    int64_t n, int64_t chunks, int16_t* utilities, int threads);
// Cells of a sketch after decisions, but for chunks that went.
void chunk_redecay(const ChunkDecisions& decisions, int64_t n, uint8_t* cells, int threads);

}  // namespace shardlab
