// Random bits for rounding, addressed by (key, row, counter): the same for any number of threads
// and any sharding. One 64-bit mix a row, then two 32-bit multiplications for two counters, n and
// n + 16: the second gets the word's halves in the other order, the high one stirred into the low.
//
// Sources: mix64 is the finaliser of splitmix64 (Steele et al. 2014); shifts and multipliers of
// mixed_lanes are those of lowbias32 (C. Wellons, hash-prospector). The last xorshift is left
// out: users take the high bits, which it does not change.
#pragma once
#include <type_traits>

#include "lanes.h"

namespace shardlab::SHARDLAB_ISA {

constexpr uint32_t kPair = 32;  // columns that share mixes
inline Bits lane_numbers() {
  static constexpr uint32_t kNumbers[kLanes] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                8, 9, 10, 11, 12, 13, 14, 15};
  return load_lanes<Bits>(kNumbers);
}
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

// 32 bits per lane, of x = low + counter * kGolden32; low and high are the halves of the lane's row
// word, and high is one number where the lanes are of one row.
template <class High>
SHARDLAB_INLINE inline Bits mixed_lanes(Bits x, High high) {
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  x ^= high;
  return (x ^ (x >> 15)) * 0xd35a2d97u;
}

// What counter n + 16 gets of counter n's mix. The high 16 bits are independent of the first's.
SHARDLAB_INLINE inline Bits second_bits(Bits x) {
  x ^= x >> 16;
  return (x << 16) | (x >> 16);
}

// Bits of one row's counters first, first + 1, ...: at(c) for c = 0, 16, 32, ..., one by one.
template <bool kAligned>
class RandomColumns;

// `first` is a multiple of kPair, as of a table that is cut at no column or at such a one. Which of
// a pair a column is follows from the column alone then, so that a loop over pairs asks nothing.
template <>
class RandomColumns<true> {
 public:
  SHARDLAB_INLINE RandomColumns(uint64_t word, uint32_t first)
      : next_(((uint32_t)word + first * kGolden32) + lane_numbers() * kGolden32),
        high_((uint32_t)(word >> 32)) {}

  SHARDLAB_INLINE Bits at(int64_t c) {
    if (c % kPair) return second_bits(shared_);
    const Bits x = next_;
    next_ += kPair * kGolden32;
    return shared_ = mixed_lanes(x, high_);
  }

 private:
  Bits next_, shared_;
  uint32_t high_;
};

template <>
class RandomColumns<false> {
 public:
  SHARDLAB_INLINE RandomColumns(uint64_t word, uint32_t first) : word_(word), first_(first) {}

  SHARDLAB_INLINE Bits at(int64_t c) {
    constexpr uint32_t kSecond = kPair / 2;
    const Bits counter = lane_numbers() + (first_ + (uint32_t)c);
    const Bits x = mixed_lanes((uint32_t)word_ + (counter & ~kSecond) * kGolden32,
                               (uint32_t)(word_ >> 32));
    return pick((counter & kSecond) != 0, second_bits(x), x);
  }

 private:
  uint64_t word_;
  uint32_t first_;
};

// Calls body(std::bool_constant) with whether `first` is a multiple of kPair.
template <class Body>
inline void with_alignment(int64_t first, const Body& body) {
  if (first % kPair)
    body(std::false_type{});
  else
    body(std::true_type{});
}

}  // namespace shardlab::SHARDLAB_ISA
