// Arithmetic of the index of chunks that the index and the row kernels share.
#pragma once
#include <cstring>

#include "chunk_store.h"

namespace shardlab {

constexpr int kTagShift = 44;  // rows of a shard stay below 2^44; wide stores hold one shard
constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;

inline uint64_t chunk_mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

inline uint64_t chunk_unmix(uint64_t x) {
  x = (x ^ (x >> 31) ^ (x >> 62)) * 0x319642B2D24D8EC3u;
  x = (x ^ (x >> 27) ^ (x >> 54)) * 0x96DE1B173F119089u;
  return x ^ (x >> 30) ^ (x >> 60);
}

inline uint64_t scaled(uint64_t hash, uint64_t size) {
  return (uint64_t)(((unsigned __int128)hash * size) >> 64);
}

// A mixer of 32 bits of little bias (C. Wellons, "Hash function prospector", 2018), and back.
inline uint32_t chunk_mix32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

inline uint32_t chunk_unmix32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x43021123u;
  x = (x ^ (x >> 15) ^ (x >> 30)) * 0x1D69E2A5u;
  return x ^ (x >> 16);
}

inline bool is_narrow(const ChunkStore& store) { return store.key_bytes == 4; }

// What cells of the sketch and draws go by.
inline uint64_t chunk_hash(const ChunkStore& store, int64_t block, int64_t row) {
  return chunk_mix((store.wide ? (uint64_t)row : (uint64_t)block << kTagShift | (uint64_t)row) + 1);
}

// Zero marks an empty slot; the mix of a number is zero for zero alone.
inline uint64_t chunk_key(const ChunkCall& call, const ChunkStore& store, int64_t block,
                          int64_t row) {
  if (is_narrow(store)) return chunk_mix32((uint32_t)(call.blocks[block].rows_before + row + 1));
  return chunk_hash(store, block, row);
}

// Keys of one chunk's rows lie beside their values, at any even address.
typedef uint32_t __attribute__((aligned(2), may_alias)) NarrowKey;
typedef uint64_t __attribute__((aligned(2), may_alias)) WideKey;
typedef int32_t __attribute__((aligned(2), may_alias)) Place;

// Places and utilities of a slot.
inline int64_t value_bytes(const ChunkStore& store) { return 6 * store.chunks; }
inline char* key_address(const ChunkStore& store, int64_t slot) {
  return (char*)store.keys + slot * store.key_stride;
}
inline uint64_t key_at(const ChunkStore& store, int64_t slot) {
  const char* at = key_address(store, slot);
  return is_narrow(store) ? *(const NarrowKey*)at : *(const WideKey*)at;
}
inline void set_key(const ChunkStore& store, int64_t slot, uint64_t key) {
  char* at = key_address(store, slot);
  if (is_narrow(store))
    *(NarrowKey*)at = (uint32_t)key;
  else
    *(WideKey*)at = key;
}
inline char* value_at(const ChunkStore& store, int64_t slot) {
  return (char*)store.values + slot * store.value_stride;
}
inline Place* places_of(char* value) { return (Place*)value; }
inline uint16_t* utilities_of(const ChunkStore& store, char* value) {
  return (uint16_t*)(value + 4 * store.chunks);
}

// Where a key would lie if it were alone.
inline int64_t home_of(const ChunkStore& store, uint64_t key) {
  return is_narrow(store) ? (int64_t)(key * (uint64_t)store.slots >> 32)
                          : (int64_t)scaled(key, store.slots);
}

template <class Key>
inline int64_t first_slot_from(const ChunkStore& store, int64_t slot, uint64_t key) {
  const char* at = key_address(store, slot);
  const int64_t stride = store.key_stride;
  for (uint64_t found; (found = *(const Key*)at) && found < key; ++slot) at += stride;
  return slot;
}

// The first slot from a key's home on that holds it, a greater one, or none.
inline int64_t first_slot(const ChunkStore& store, uint64_t key) {
  const int64_t home = home_of(store, key);  // the array ends with a gap
  return is_narrow(store) ? first_slot_from<NarrowKey>(store, home, key)
                          : first_slot_from<WideKey>(store, home, key);
}

// The line of a key's home, and the next one where a run is likely to cross over.
__attribute__((always_inline)) inline void prefetch_run(const ChunkStore& store, uint64_t key) {
  constexpr int64_t kLikelyBytes = 32;
  const char* home = key_address(store, home_of(store, key));
  __builtin_prefetch(home);
  __builtin_prefetch(home + kLikelyBytes);
}

// Slot of a key, or -1.
inline int64_t find_slot(const ChunkStore& store, uint64_t key) {
  const int64_t s = first_slot(store, key);
  return key_at(store, s) == key ? s : -1;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// Utilities of present chunks are bf16, rounded stochastically; their sign is a mark.
inline float utility_of(uint16_t code) {
  return float_of((uint32_t)(code & (kMarked - 1)) << 16);
}
inline uint16_t utility_code(float u, uint64_t word) {
  return (uint16_t)((bits_of(u) + (uint32_t)(word & 0xffff)) >> 16);
}

// Random word of a chunk; its table and place in the table alone decide.
inline uint64_t chunk_word(const ChunkBlock& block, uint64_t key, int64_t row, int64_t chunk) {
  const uint64_t at = (uint64_t)(block.row_start + row) * (uint64_t)block.table_chunks +
                      (uint64_t)(block.first_chunk + chunk);
  return chunk_mix((key ^ (uint64_t)block.table_key) + at * kGolden);
}

// Whether the absent chunks of a row count in a step of which a share of the rows does, by chance. By
// bits of the word of its first chunk that rounding does not take.
inline bool row_counts(const ChunkBlock& block, uint64_t key, int64_t row, float share) {
  if (share >= 1.0f) return true;
  const uint64_t word = chunk_word(block, key, row, -block.first_chunk);
  return (float)(word >> 40) * 0x1p-24f < share;
}

}  // namespace shardlab
