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

// Zero marks an empty slot; the mix of a number is zero for zero alone.
inline uint64_t chunk_key(const ChunkStore& store, int64_t block, int64_t row) {
  return chunk_mix((store.wide ? (uint64_t)row : (uint64_t)block << kTagShift | (uint64_t)row) + 1);
}

// Places, utilities, and padding to whole words.
inline int64_t value_bytes(const ChunkStore& store) { return (6 * store.chunks + 3) / 4 * 4; }
inline uint64_t* keys_of(const ChunkStore& store) { return (uint64_t*)store.keys; }
inline char* value_at(const ChunkStore& store, int64_t slot) {
  return (char*)store.values + slot * value_bytes(store);
}
inline int32_t* places_of(char* value) { return (int32_t*)value; }
inline uint16_t* utilities_of(const ChunkStore& store, char* value) {
  return (uint16_t*)(value + 4 * store.chunks);
}

// The first slot from a hash's home on that holds it, a greater one, or none.
inline int64_t first_slot(const ChunkStore& store, uint64_t hash) {
  const uint64_t* keys = keys_of(store);
  int64_t s = (int64_t)scaled(hash, store.slots);
  while (keys[s] && keys[s] < hash) ++s;  // the array ends with a gap
  return s;
}

// The line of a hash's home and the next one: with 7 of 8 slots taken, every other run crosses over.
inline void prefetch_run(const ChunkStore& store, uint64_t hash) {
  constexpr int64_t kLineKeys = 64 / sizeof(uint64_t);
  const uint64_t* home = keys_of(store) + scaled(hash, store.slots);
  __builtin_prefetch(home);
  __builtin_prefetch(home + kLineKeys);
}

// Slot of a key, or -1.
inline int64_t find_slot(const ChunkStore& store, uint64_t key) {
  const int64_t s = first_slot(store, key);
  return keys_of(store)[s] == key ? s : -1;
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

}  // namespace shardlab
