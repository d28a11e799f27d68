// Unique ids of many segments at once, and who contributed to each: the sort that every sharded
// step is built on.
#pragma once
#include <cstdint>

namespace shardlab {

// Entries [start, start+count) of the ids belong to `segment`. Entry i of the chunk has the source
// offset base + bag * step, where bag is bags[start + i], or i when there are no bags.
// Chunks come sorted by segment.
struct Chunk {
  int64_t segment, start, count, base, step;
};

enum class Bounds : int64_t { kError, kClampToZero, kIgnore };

struct UniqueResult {
  int64_t* ids;        // [n] sorted ids of segment 0, then of segment 1, ...
  int64_t* splits;     // [segments + 1] into ids
  int64_t* starts;     // [n + 1] entries of every unique id
  int64_t* sources;    // [n] source offsets, grouped by unique id, in entry order
  int64_t* positions;  // [n] the same entries as positions in the input ids, or null
  int64_t* inverse;    // [positions in the input] index into ids, -1 when dropped; or null
};

// Returns the number of unique ids, or -(p + 1) when the id at position p is out of bounds.
template <class Id>
int64_t unique_segments(const Id* ids, const Chunk* chunks, int64_t num_chunks,
                        int64_t num_segments, const int64_t* limits, const int64_t* bounds,
                        const int64_t* bags, const UniqueResult& result, int threads);

// Routes bags to the row blocks of their tables, keeping order. Feature bags are [features][batch].
// Table t: features [t.first_feature, +num_features), row blocks [t.first_block, +num_blocks) with
// block_ends[] as upper row bounds. See ops/route.py for the layout of the outputs.
struct RouteTable {
  int64_t first_feature, num_features, first_block, num_blocks, rows, bounds;
};
int64_t route_bags(const int64_t* ids, const int64_t* offsets, int64_t length, int64_t batch,
                   const RouteTable* tables, int64_t num_tables, const int64_t* block_ends,
                   int64_t* out_ids, int64_t* out_positions, int64_t* out_lengths,
                   int64_t* out_counts, int threads);

// index[i] of lower_bound(ids[splits[s] .. splits[s+1]), row) + splits[s] for (s, row) queries.
void split_sorted(const int64_t* ids, const int64_t* splits, const int64_t* queries,
                  int64_t num_queries, int64_t* index);

// out[out_start + i] = ids[start + i] - subtract for pieces {start, count, subtract, out_start}.
template <class Id>
void pack_ids(const int64_t* ids, const int64_t* pieces, int64_t num_pieces, Id* out);

// The same with every id in piece[4] bytes, from byte piece[3] of `out` on; and back, for pieces
// {first byte, count, bytes of an id, out_start}.
void pack_bytes(const int64_t* ids, const int64_t* pieces, int64_t num_pieces, char* out);
void unpack_bytes(const char* source, const int64_t* pieces, int64_t num_pieces, int64_t* out);

// out[start + i] = base + i * step for pieces {start, count, base, step}.
void fill_affine(const int64_t* pieces, int64_t num_pieces, int64_t* out);

// Uniform fp32 initial weights of a block of a table: value(row, column) depends on the seed, the
// row and the column alone, so that every sharding starts from the same table.
void init_uniform(char* rows, int64_t row_bytes, int64_t num_rows, int64_t columns,
                  uint64_t seed, int64_t first_row, int64_t first_column, int64_t table_columns,
                  float low, float high, int threads);
// The same of scattered pieces of `columns` columns: piece numbers[i] of table tables[i], counted
// over all rows of the table. bounds: [tables, 2] (low, high).
void init_pieces(float* values, int64_t count, int64_t columns, const int64_t* numbers,
                 const int64_t* tables, const int64_t* seeds, const float* bounds, int threads);

}  // namespace shardlab
