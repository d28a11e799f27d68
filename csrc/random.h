// Random bits for rounding, addressed by (key, row, counter): the same for any number of threads
// and any sharding. One 64-bit mix a row, then two 32-bit multiplications for two counters, n and
// n + 16: the second gets the word's halves in the other order, the high one stirred into the low.
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

// What counter n + 16 gets of counter n's mix. The high 16 bits are independent of the first's.
SHARDLAB_INLINE inline Bits second_bits(Bits x) {
  x ^= x >> 16;
  return (x << 16) | (x >> 16);
}

// Bits of one row's counters first, first + 1, ...; columns are asked for in ascending order,
// sixteen at a time.
class RandomColumns {
 public:
  SHARDLAB_INLINE RandomColumns(uint64_t word, uint32_t first) : word_(word), first_(first) {}

  SHARDLAB_INLINE Bits at(int64_t c) {
    const uint32_t counter = first_ + (uint32_t)c;
    if (counter % kLanes) return astride(counter);
    if (!(counter & kSecond)) return shared_ = mixed(counter);
    return second_bits(c ? shared_ : mixed(counter - kSecond));
  }

 private:
  static constexpr uint32_t kSecond = 16;
  static constexpr Bits kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

  // One multiplication a vector: (first + lane) * golden, with the lane's share known.
  SHARDLAB_INLINE Bits mixed(uint32_t first) const {
    Bits x = ((uint32_t)word_ + first * kGolden32) + kLane * kGolden32;
    x = (x ^ (x >> 16)) * 0x21f0aaadu;
    x ^= (uint32_t)(word_ >> 32);
    return (x ^ (x >> 15)) * 0xd35a2d97u;
  }

  // A table cut at a column that is no multiple of sixteen.
  Bits astride(uint32_t first) const {
    const Bits counter = kLane + first;
    const Bits x = mix_lanes(Bits{} + (uint32_t)word_, Bits{} + (uint32_t)(word_ >> 32),
                             counter & ~kSecond);
    return (counter & kSecond) != 0 ? second_bits(x) : x;
  }

  uint64_t word_;
  uint32_t first_;
  Bits shared_;
};

}  // namespace shardlab::SHARDLAB_ISA
