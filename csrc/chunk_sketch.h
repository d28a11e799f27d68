// The utilities of chunks that a store does not hold: a count-min sketch in bytes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "chunk_slots.h"

namespace shardlab {

// A chunk's two cells lie in one line of cache.
constexpr int64_t kLine = 64;
// Cells: 6 bits of exponent from 2^-48 on, 2 of mantissa; 0 is zero.
constexpr int32_t kCellShift = 21, kCellBias = 316, kTopCell = 255;
constexpr float kLeastUtility = 0x1p-48f;

inline float cell_value(uint8_t code) {
  return code ? float_of((uint32_t)(code + kCellBias) << kCellShift) : 0.0f;
}
inline uint8_t cell_code(float u, uint32_t random) {
  const int32_t code = (int32_t)((bits_of(u) + random) >> kCellShift) - kCellBias;
  return (uint8_t)std::clamp(code, 0, kTopCell);
}

// Cell c of a sketch after a decision.
inline uint8_t decayed_cell(uint8_t cell, int64_t c, float decay, uint64_t key) {
  const uint64_t word = chunk_mix(key + (uint64_t)c * kGolden);
  return cell_code(cell_value(cell) * decay, (word >> 16) & ((1u << kCellShift) - 1));
}

// A utility as decisions see it: those of chunks that nobody asked for differ by chance.
inline float ranked(float utility, float decay, const ChunkBlock& block, int64_t row,
                    int64_t chunk) {
  if (utility * decay >= kLeastUtility) return utility * decay;
  const uint64_t word = chunk_word(block, 0, row, chunk);
  return std::max(utility * decay, (float)(word >> 40) * 0x1p-24f * kLeastUtility);
}

struct Cells {
  uint8_t *first, *second;
  float value() const { return cell_value(std::min(*first, *second)); }
  void raise(uint8_t to) const {
    *first = std::max(*first, to);
    *second = std::max(*second, to);
  }
};

inline uint64_t line_number(const ChunkStore& s, uint64_t hash) {
  return scaled(hash << 32 | hash >> 32, s.sketch_lines);
}
inline uint8_t* line_of(const ChunkStore& s, uint64_t hash) {
  return (uint8_t*)s.sketch + kLine * line_number(s, hash);
}
inline void mark_line(const ChunkStore& s, uint64_t hash) {
  if (s.line_marks) ((uint8_t*)s.line_marks)[line_number(s, hash)] = 1;
}
inline Cells cells_of(uint8_t* line, uint64_t hash, int64_t chunk) {
  const uint64_t word = chunk_mix(hash + (uint64_t)(chunk + 1) * kGolden);
  const int64_t first = word % kLine, second = (first + 1 + word / kLine % (kLine - 1)) % kLine;
  return {line + first, line + second};
}

}  // namespace shardlab
