// One set of a cache: finding a row, noting its use, choosing who leaves. SSE2 is enough: a set is
// one or two cache lines at a random address, and waiting for them is what a lookup costs.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "cache.h"

namespace shardlab {

// A state is dirty in bit 0 and above it the LRU rank (0 = used last) or the LFU count.
constexpr uint8_t kDirty = 1, kOne = 2;
constexpr int kMaxCount = 127;
// A full set forgets half of its counts once in 2^10 misses on average.
constexpr int kDecayBits = 10;
// Rarest admission: one try in 2^10.
constexpr int kMaxAdmissionBits = 10;

inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352dU;
  x = (x ^ (x >> 15)) * 0x846ca68bU;
  return x ^ (x >> 16);
}

// floor(value / divisor) for values below 2^53: a multiplication and a correction.
struct Divider {
  explicit Divider(int64_t d) : divisor(d), inverse(1.0 / (double)d) {}
  int64_t quotient(int64_t value) const {
    const int64_t q = (int64_t)((double)value * inverse), rest = value - q * divisor;
    return q - (rest < 0) + (rest >= divisor);
  }
  int64_t divisor;
  double inverse;
};

// What chance decides about a row that finds its set full, from (seed, step, row).
class Chance {
 public:
  Chance(int64_t seed, int64_t step)
      : key_(mix(mix(mix((uint32_t)seed) + (uint32_t)(seed >> 32)) ^ (uint32_t)step) +
             (uint32_t)(step >> 32)) {}
  uint32_t draw(int64_t row) const {
    return mix(mix((uint32_t)row ^ key_) + (uint32_t)(row >> 32));
  }
  // The way that is looked at first among those with equal counts: bits 20 to 31.
  static int tie_start(uint32_t drawn, int ways) { return (int)((drawn >> 20) * ways >> 12); }
  // Whether it enters in place of a row of this count: bits 10 to 19.
  static bool enters(uint32_t drawn, int weakest) {
    const int bits = std::min(weakest, kMaxAdmissionBits);
    return (drawn >> 10 & ((1u << bits) - 1)) == 0;
  }
  // Whether the set forgets: bits 0 to 9.
  static bool decays(uint32_t drawn) { return (drawn & ((1u << kDecayBits) - 1)) == 0; }

 private:
  uint32_t key_;
};

struct Spot {
  int64_t set;
  uint32_t tag;
};

// Sets of a block, by the width of its tags.
template <class Tag>
class Sets {
 public:
  static constexpr Tag kEmpty = (Tag)~(Tag)0;

  Sets(const CacheBlock& block, uint8_t* meta)
      : base_(meta + block.offset), sets_(block.sets), ways_((int)block.ways),
        stride_(block.record_bytes), divider_(block.sets),
        by_ways_(block.ways) {}

  // Consecutive rows lie in consecutive sets, turned by a hash of the tag: ids in steps of some
  // number spread although that number and the sets have a common factor.
  Spot locate(int64_t row) const {
    const int64_t tag = divider_.quotient(row);
    const int64_t set = row - tag * sets_ + turn((uint32_t)tag);
    return {set < sets_ ? set : set - sets_, (uint32_t)tag};
  }
  int64_t row(int64_t set, uint32_t tag) const {
    const int64_t rest = set - turn(tag);
    return (int64_t)tag * sets_ + (rest < 0 ? rest + sets_ : rest);
  }

  int ways() const { return ways_; }
  int64_t set_of(int64_t slot) const { return by_ways_.quotient(slot); }
  uint8_t* tags(int64_t set) const { return base_ + set * stride_; }
  uint8_t* states(int64_t set) const { return tags(set) + ways_ * (int64_t)sizeof(Tag); }
  __attribute__((always_inline)) void prefetch(int64_t set) const {
    __builtin_prefetch(tags(set), 1);
    __builtin_prefetch(tags(set) + stride_ - 1, 1);
  }
  Tag tag(int64_t set, int way) const {
    Tag value;
    std::memcpy(&value, tags(set) + way * sizeof(Tag), sizeof(Tag));
    return value;
  }
  void set_tag(int64_t set, int way, Tag value) const {
    std::memcpy(tags(set) + way * sizeof(Tag), &value, sizeof(Tag));
  }

  // The first way that has this tag, or -1. All ways are compared before the one branch: which way
  // it is cannot be predicted.
  int find(int64_t set, Tag wanted) const {
    uint64_t found = 0;
    int way = 0;
#if defined(__SSE2__)
    const uint8_t* tags = this->tags(set);
    for (; way + kStep <= ways_; way += kStep) found |= match(tags, way, wanted);
    if (way < ways_ && ways_ >= kStep) found |= match(tags, ways_ - kStep, wanted), way = ways_;
#endif
    for (; way < ways_; ++way) found |= (uint64_t)(tag(set, way) == wanted) << way;
    return found ? std::countr_zero(found) : -1;
  }

 private:
  int64_t turn(uint32_t tag) const {
    uint32_t x = tag * 0x9e3779b1U;
    x = (x ^ (x >> 15)) * 0x846ca68bU;
    return (int64_t)(((uint64_t)x * (uint64_t)sets_) >> 32);
  }

#if defined(__SSE2__)
  static constexpr int kStep = 16 / sizeof(Tag);
  // Those of the ways [way, way + kStep) that have the tag, a bit each.
  static uint64_t match(const uint8_t* tags, int way, Tag wanted) {
    const __m128i found = _mm_loadu_si128((const __m128i*)(tags + way * sizeof(Tag)));
    int bits;
    if constexpr (sizeof(Tag) == 2) {
      const __m128i equal = _mm_cmpeq_epi16(found, _mm_set1_epi16((short)wanted));
      bits = _mm_movemask_epi8(_mm_packs_epi16(equal, _mm_setzero_si128()));
    } else {
      const __m128i equal = _mm_cmpeq_epi32(found, _mm_set1_epi32((int)wanted));
      bits = _mm_movemask_ps(_mm_castsi128_ps(equal));
    }
    return (uint64_t)(uint32_t)bits << way;
  }
#endif

  uint8_t* base_;
  int64_t sets_;
  int ways_;
  int64_t stride_;
  Divider divider_, by_ways_;
};

#if defined(__SSE2__)
// One more for those of 16 states that are below `rank`. States are below 128 (64 ranks), so that
// a signed comparison serves.
inline __m128i age_later(__m128i states, uint8_t rank) {
  const __m128i later = _mm_cmplt_epi8(states, _mm_set1_epi8((char)rank));
  return _mm_add_epi8(states, _mm_and_si128(later, _mm_set1_epi8(kOne)));
}
#endif

// Rank 0 for `way`; those used after it move back by one.
inline void touch_lru(uint8_t* states, int ways, int way) {
  const uint8_t rank = states[way] & ~kDirty, dirty = states[way] & kDirty;
  if (!rank) return;
  int w = 0;
#if defined(__SSE2__)
  if (ways >= 16) {
    // The last 16 overlap those before; they are read first and give the same bytes.
    __m128i* const end = (__m128i*)(states + ways - 16);
    const __m128i last = age_later(_mm_loadu_si128(end), rank);
    for (; w + 16 < ways; w += 16) {
      __m128i* const part = (__m128i*)(states + w);
      _mm_storeu_si128(part, age_later(_mm_loadu_si128(part), rank));
    }
    _mm_storeu_si128(end, last);
    w = ways;
  }
#endif
  for (; w < ways; ++w)
    if (states[w] < rank) states[w] += kOne;
  states[way] = dirty;
}

inline void halve_counts(uint8_t* states, int ways) {
  for (int w = 0; w < ways; ++w)
    states[w] = (uint8_t)((states[w] >> 1 & ~kDirty) | (states[w] & kDirty));
}

inline void touch_lfu(uint8_t* states, int ways, int way) {
  if (states[way] >> 1 == kMaxCount) halve_counts(states, ways);
  states[way] += kOne;
}

// Those of 64 bytes that are equal to the smallest of them, a bit each, and that byte.
struct Smallest {
  uint64_t ways;
  uint8_t value;
};
inline Smallest smallest_bytes(const uint8_t* bytes) {
  uint64_t ways = 0;
#if defined(__SSE2__)
  const __m128i* const parts = (const __m128i*)bytes;
  __m128i low = _mm_min_epu8(_mm_min_epu8(parts[0], parts[1]), _mm_min_epu8(parts[2], parts[3]));
  low = _mm_min_epu8(low, _mm_srli_si128(low, 8));
  low = _mm_min_epu8(low, _mm_srli_si128(low, 4));
  low = _mm_min_epu8(low, _mm_srli_si128(low, 2));
  low = _mm_min_epu8(low, _mm_srli_si128(low, 1));
  const uint8_t value = (uint8_t)_mm_cvtsi128_si32(low);
  const __m128i wanted = _mm_set1_epi8((char)value);
  for (int i = 0; i < 4; ++i)
    ways |= (uint64_t)(uint32_t)_mm_movemask_epi8(_mm_cmpeq_epi8(parts[i], wanted)) << 16 * i;
#else
  const uint8_t value = *std::min_element(bytes, bytes + 64);
  for (int i = 0; i < 64; ++i) ways |= (uint64_t)(bytes[i] == value) << i;
#endif
  return {ways, value};
}

// Of the ways that are not pinned the one that leaves first, or -1: the highest LRU rank, or the
// lowest LFU count, of equals the first from `start` on. Without branches on the states, which
// nothing could predict.
inline int find_victim(const uint8_t* states, int ways, uint64_t pins, bool lfu, int start) {
  constexpr uint64_t kEach = 0x0101010101010101U;
  alignas(16) uint8_t keys[64];
  std::memset(keys, 0xff, sizeof(keys));
  pins |= ways < 64 ? ~0ULL << ways : 0;
  for (int i = 0; i < (ways + 7) / 8; ++i) {
    uint64_t part = 0;
    if (8 * i + 8 <= ways)
      std::memcpy(&part, states + 8 * i, 8);
    else
      for (int w = 8 * i; w < ways; ++w) part |= (uint64_t)states[w] << 8 * (w & 7);
    part = (part >> 1 & 0x7f * kEach) ^ (lfu ? 0 : 0x7f * kEach);
    // Bit j of the pins into byte j, and from there into its top bit.
    const uint64_t pinned = (pins >> 8 * i & 0xff) * kEach & 0x8040201008040201U;
    part |= (pinned + 0x7f * kEach) & 0x80 * kEach;
    std::memcpy(keys + 8 * i, &part, 8);
  }
  const Smallest found = smallest_bytes(keys);
  if (found.value & 0x80) return -1;
  const uint64_t later = found.ways >> start << start;
  return std::countr_zero(later ? later : found.ways);
}

}  // namespace shardlab
