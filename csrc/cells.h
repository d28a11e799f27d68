// Index arithmetic of the exchange: where cells lie in a buffer, and what ranks ask for. All of it is
// int64; a part is what belongs to one rank, and parts stand in slot order, this rank's own last.
#pragma once
#include <cstdint>
#include <vector>

namespace shardlab {

using Sizes = std::vector<int64_t>;

// One end's cells, part by part.
struct CellEnd {
  const int64_t* table;   // [cells, 3]: pooled, travels at all, bytes of a vector
  const int64_t* counts;  // [cells]: ids
  Sizes cells_of;         // by part: cells
  Sizes samples_of;       // by part: samples, which are the vectors of pooled cells
  int64_t* vectors;       // [cells], out
  int64_t* bytes;         // [cells], out: of all vectors, in whole words
  int64_t* at;            // [cells], out: first byte in the buffer
};

// Lays out [what travels | what arrives | what stays] and returns the bytes of every part of either
// end. The sender's parts but the last travel; every part begins with `head` bytes.
struct PartBytes {
  Sizes slots, cells;
};
PartBytes place_cells(const CellEnd& slots, const CellEnd& cells, int64_t head, bool cells_send);

// What every slot asks for. table [slots, 4]: group, whether this rank asks, first row, bytes of an
// id. Groups begin at `starts` and have `counts` ids. pieces [slots, 5] are those of pack_bytes;
// slot_counts and slot_starts [slots] are two of their columns. Returns the bytes of all pieces.
int64_t route_slots(const int64_t* table, int64_t slots, const int64_t* starts,
                    const int64_t* counts, int64_t* pieces, int64_t* slot_counts,
                    int64_t* slot_starts);

// Heads of messages: [parts, 4 + slots] int32: samples, bag length, bytes of a bag's length, whether
// weights follow, then ids of every slot. table [slots, 2]: bytes of an id, whether pooled.
struct Heads {
  const int32_t* heads;
  int64_t parts, slots;
  const int64_t* table;
};
// counts [parts, slots]; pieces [parts * slots, 4] of unpack_bytes, for messages one behind the
// other. Returns the bytes of every message.
Sizes read_heads(const Heads& h, int64_t* counts, int64_t* pieces);

// out[k][c] = columns[c][index[k]]: [count, columns] from columns that lie apart.
void select_columns(const std::vector<const int64_t*>& columns, const int64_t* index,
                    int64_t count, int64_t* out);

// out[i] = -1 where inverse[i] is -1, else the value at inverse[i] of a row of `total` values that
// pieces (start, count, base, step) fill: base + j * step at start + j.
void take_affine(const int64_t* pieces, int64_t num_pieces, int64_t total, const int64_t* inverse,
                 int64_t count, int64_t* out);

// Sums of counts[i] * factors[i] over consecutive parts.
Sizes sum_parts(const int64_t* counts, const int64_t* factors, const Sizes& cells_of);

// Sums of values[i] by keys[i], 0 <= keys[i] < num_keys.
Sizes sum_by_key(const int64_t* values, const int64_t* keys, int64_t count, int64_t num_keys);

}  // namespace shardlab
