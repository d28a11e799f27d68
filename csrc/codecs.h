// Rows in any precision: encode, decode, and move between blocks. Formats: docs/precision.md.
#pragma once
#include <cstdint>

#include "rows.h"

namespace shardlab {

// Bytes of a row of `columns` elements with its scale.
inline int64_t payload_bytes(Codec codec, int64_t columns) {
  switch (codec) {
    case Codec::kFp32: return 4 * columns;
    case Codec::kFp16:
    case Codec::kBf16: return 2 * columns;
    case Codec::kFp8:
    case Codec::kFp8E5m2:
    case Codec::kInt8: return columns + 1;
    case Codec::kInt4: return (columns + 1) / 2 + 1;
  }
  return 0;
}

// Rows of a matrix: row i of `values` [rows, columns] lies at i * value_step elements, its record
// at i * record_step bytes.
struct RowCodes {
  Codec codec;
  int64_t rows, columns, value_step, record_step;
};

// Random bits of row i are those of row row_ids[i], or of first_row + i where row_ids is null.
struct Rounding {
  bool stochastic;
  uint64_t key;
  int64_t first_row, first_column;
  const int64_t* row_ids;
};

// Rows [start, start + count) of the lists of places.
struct MoveSegment {
  int64_t source_block, target_block, start, count;
};

// The records of one end of a move: places[k] is the k-th record's number in its block.
struct MoveEnd {
  Arena arena;
  const int64_t* places;
};

struct CodecKernels {
  void (*encode)(const RowCodes& codes, const float* values, char* records,
                 const Rounding& rounding, int threads);
  void (*decode)(const RowCodes& codes, const char* records, float* values, int threads);
  // Copies or converts records; row_ids: rows of the whole table, or null (the target's places).
  void (*move)(const MoveEnd& source, const MoveEnd& target, const MoveSegment* segments,
               int64_t num_segments, uint64_t key, const int64_t* row_ids, int threads);
};

}  // namespace shardlab
