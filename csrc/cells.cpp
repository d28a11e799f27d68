#include "cells.h"

#include <cstddef>
#include <numeric>

#include "unique.h"

namespace shardlab {
namespace {

constexpr int64_t kWordBytes = 4, kFp32Bytes = 4;
constexpr int64_t kCellNumbers = 3, kSlotNumbers = 4, kHeadNumbers = 4;

// Vectors and bytes of every cell, and its place in its part; returns the bytes of the parts.
Sizes fill_parts(const CellEnd& end, int64_t head) {
  Sizes parts;
  int64_t cell = 0;
  for (std::size_t part = 0; part < end.cells_of.size(); ++part) {
    int64_t inside = head;
    for (int64_t last = cell + end.cells_of[part]; cell < last; ++cell) {
      const int64_t* row = end.table + cell * kCellNumbers;
      const int64_t vectors = (row[0] ? end.samples_of[part] : end.counts[cell]) * row[1];
      end.vectors[cell] = vectors;
      end.bytes[cell] = (vectors * row[2] + kWordBytes - 1) / kWordBytes * kWordBytes;
      end.at[cell] = inside;
      inside += end.bytes[cell];
    }
    parts.push_back(inside);
  }
  return parts;
}

// Parts one behind the other from `before` on, the last at `home`.
void shift_parts(const CellEnd& end, const Sizes& parts, int64_t before, int64_t home) {
  int64_t cell = 0;
  for (std::size_t part = 0; part < parts.size(); ++part) {
    const int64_t first = part + 1 < parts.size() ? before : home;
    for (int64_t last = cell + end.cells_of[part]; cell < last; ++cell) end.at[cell] += first;
    before += parts[part];
  }
}

int64_t all_but_last(const Sizes& parts) {
  return std::accumulate(parts.begin(), parts.end() - 1, int64_t{0});
}

}  // namespace

PartBytes place_cells(const CellEnd& slots, const CellEnd& cells, int64_t head, bool cells_send) {
  const PartBytes parts{fill_parts(slots, head), fill_parts(cells, head)};
  const int64_t of_slots = all_but_last(parts.slots), of_cells = all_but_last(parts.cells);
  const int64_t home = of_slots + of_cells;
  shift_parts(slots, parts.slots, cells_send ? of_cells : 0, home);
  shift_parts(cells, parts.cells, cells_send ? 0 : of_slots, home);
  return parts;
}

int64_t route_slots(const int64_t* table, int64_t slots, const int64_t* starts,
                    const int64_t* counts, int64_t* pieces, int64_t* slot_counts,
                    int64_t* slot_starts) {
  int64_t target = 0;
  for (int64_t s = 0; s < slots; ++s, pieces += 5) {
    const int64_t* row = table + s * kSlotNumbers;
    const int64_t count = counts[row[0]] * row[1];
    slot_counts[s] = count;
    slot_starts[s] = starts[row[0]];
    pieces[0] = starts[row[0]];
    pieces[1] = count;
    pieces[2] = row[2];
    pieces[3] = target;
    pieces[4] = row[3];
    target += count * row[3];
  }
  return target;
}

Sizes read_heads(const Heads& h, int64_t* counts, int64_t* pieces) {
  Sizes sizes;
  int64_t first = 0, ids = 0;
  for (int64_t part = 0; part < h.parts; ++part) {
    const int32_t* head = h.heads + part * (kHeadNumbers + h.slots);
    const int64_t samples = head[0], length_bytes = head[2], weighted = head[3];
    int64_t at = first, pooled_slots = 0, pooled_ids = 0;
    for (int64_t s = 0; s < h.slots; ++s, pieces += 4) {
      const int64_t count = head[kHeadNumbers + s], width = h.table[2 * s];
      *counts++ = count;
      pieces[0] = at;
      pieces[1] = count;
      pieces[2] = width;
      pieces[3] = ids;
      at += count * width;
      ids += count;
      if (h.table[2 * s + 1]) {
        ++pooled_slots;
        pooled_ids += count;
      }
    }
    at += pooled_slots * samples * length_bytes + (weighted ? kFp32Bytes * pooled_ids : 0);
    sizes.push_back(at - first);
    first = at;
  }
  return sizes;
}

void select_columns(const std::vector<const int64_t*>& columns, const int64_t* index,
                    int64_t count, int64_t* out) {
  for (int64_t k = 0; k < count; ++k)
    for (const int64_t* column : columns) *out++ = column[index[k]];
}

void take_affine(const int64_t* pieces, int64_t num_pieces, int64_t total, const int64_t* inverse,
                 int64_t count, int64_t* out) {
  static thread_local std::vector<int64_t> values;
  if ((int64_t)values.size() < total) values.resize(total);
  fill_affine(pieces, num_pieces, values.data());
  for (int64_t i = 0; i < count; ++i) out[i] = inverse[i] < 0 ? -1 : values[inverse[i]];
}

Sizes sum_parts(const int64_t* counts, const int64_t* factors, const Sizes& cells_of) {
  Sizes sums;
  for (const int64_t cells : cells_of) {
    int64_t sum = 0;
    for (int64_t c = 0; c < cells; ++c) sum += *counts++ * *factors++;
    sums.push_back(sum);
  }
  return sums;
}

Sizes sum_by_key(const int64_t* values, const int64_t* keys, int64_t count, int64_t num_keys) {
  Sizes sums(num_keys);
  for (int64_t i = 0; i < count; ++i) sums[keys[i]] += values[i];
  return sums;
}

}  // namespace shardlab
