// Rows of a store, for those who read it while it trains: what they hold, and which changed.
#include <omp.h>

#include <algorithm>

#include "chunk_index.h"

namespace shardlab {

void chunk_get(const ChunkCall& call, int64_t block, const int64_t* rows, int64_t n,
               int32_t* places, uint16_t* utilities) {
  constexpr int64_t kTile = 32;
  const ChunkStore& store = call.stores[call.blocks[block].store];
  uint64_t keys[kTile];
  for (int64_t tile = 0; tile < n; tile += kTile) {
    const int64_t end = std::min(kTile, n - tile);
    for (int64_t i = 0; i < end; ++i) {
      keys[i] = chunk_key(call, store, block, rows[tile + i]);
      __builtin_prefetch(key_address(store, home_of(store, keys[i])));
    }
    for (int64_t i = 0; i < end; ++i) {
      const int64_t slot = find_slot(store, keys[i]), at = (tile + i) * store.chunks;
      if (slot < 0) {
        std::fill_n(places + at, store.chunks, -1);
        std::fill_n(utilities + at, store.chunks, (uint16_t)0);
        continue;
      }
      char* value = value_at(store, slot);
      std::copy_n(places_of(value), store.chunks, places + at);
      std::copy_n(utilities_of(store, value), store.chunks, utilities + at);
    }
  }
}

namespace {

bool is_marked(const ChunkStore& store, char* value) {
  const uint16_t* utilities = utilities_of(store, value);
  for (int64_t k = 0; k < store.chunks; ++k)
    if (places_of(value)[k] >= 0 && (utilities[k] & kMarked)) return true;
  return false;
}

}  // namespace

int64_t chunk_between(const ChunkCall& call, int64_t number, const ChunkRange& in,
                      int64_t* found) {
  const ChunkStore& store = call.stores[number];
  int64_t count = 0;
  for_slice(call, number, in.slice, in.slices,
            [&](int64_t block, int64_t row, int64_t, char* value) {
              if ((in.block >= 0 && block != in.block) || row < in.low || row >= in.high) return;
              if (in.marks != Marks::kAny && is_marked(store, value) != (in.marks == Marks::kSet))
                return;
              if (found) found[2 * count] = block, found[2 * count + 1] = row;
              ++count;
            });
  return count;
}

void chunk_redecide(const ChunkBlock& block, const ChunkDecisions& decisions, const int64_t* rows,
                    int64_t n, int64_t chunks, int16_t* utilities, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < chunks; ++k) {
      int16_t& code = utilities[i * chunks + k];
      for (int64_t d = 0; code >= 0 && d < decisions.count; ++d) {
        const float utility = utility_of((uint16_t)code), decay = decisions.decays[d];
        const uint64_t word = chunk_word(block, (uint64_t)decisions.keys[d], rows[i], k);
        const bool stays = ranked(utility, decay, block, rows[i], k) >= decisions.thresholds[d];
        code = stays ? (int16_t)utility_code(utility * decay, word) : (int16_t)-1;
      }
    }
}

void chunk_redecay(const ChunkDecisions& decisions, int64_t n, uint8_t* cells, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t c = 0; c < n; ++c)
    for (int64_t d = 0; cells[c] && d < decisions.count; ++d)
      cells[c] = decayed_cell(cells[c], c, decisions.decays[d], (uint64_t)decisions.keys[d]);
}

void chunk_unmark(const ChunkStore& store) {
  const int64_t span = span_of(store.slots);
  for (int64_t s = 0; s < span; ++s) {
    if (!key_at(store, s)) continue;
    uint16_t* utilities = utilities_of(store, value_at(store, s));
    for (int64_t k = 0; k < store.chunks; ++k) utilities[k] &= (uint16_t)(kMarked - 1);
  }
  if (store.line_marks) std::memset((void*)store.line_marks, 0, store.sketch_lines);
}

}  // namespace shardlab
