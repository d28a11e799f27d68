// Random bits for rounding, addressed by (key, row, counter): the same for any number of threads
// and any sharding. One 64-bit mix a row, then two 32-bit multiplications a lane.
//
// Sources: mix64 is the finaliser of splitmix64 (Steele et al. 2014); shifts and multipliers of
// random_lanes are those of lowbias32 (C. Wellons, hash-prospector). The last xorshift is left
// out: users take the high bits, which it does not change.
#pragma once
#include "lanes.h"

namespace shardlab::SHARDLAB_ISA {

constexpr uint64_t kGolden64 = 0x9E3779B97F4A7C15u;
constexpr uint32_t kGolden32 = 0x9E3779B9u;

inline uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// `key` belongs to (seed, step, table), `row` is the row of the whole table.
inline uint64_t row_word(uint64_t key, int64_t row) {
  return mix64(key + (uint64_t)row * kGolden64);
}

// 32 bits per lane; low and high are the halves of the lane's row word.
inline Bits mix_lanes(Bits low, Bits high, Bits counter) {
  Bits x = low + counter * kGolden32;
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  x ^= high;
  return (x ^ (x >> 15)) * 0xd35a2d97u;
}

// Of one row, for the counters first, first + 1, ...
SHARDLAB_INLINE inline Bits random_lanes(uint64_t word, uint32_t first) {
  constexpr Bits kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  // One multiplication a vector: (first + lane) * golden, with the lane's share known.
  Bits x = ((uint32_t)word + first * kGolden32) + kLane * kGolden32;
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  x ^= (uint32_t)(word >> 32);
  return (x ^ (x >> 15)) * 0xd35a2d97u;
}

}  // namespace shardlab::SHARDLAB_ISA
