#include "chunk_store.h"

#include <omp.h>

#include <algorithm>

#include "chunk_index.h"

namespace shardlab {
namespace {

// Calls body(store, block number, ids' position) over the segments' parts of a thread.
template <class Body>
void for_ids(const ChunkCall& call, const ChunkSegment* segments, int64_t num_segments, int threads,
             const Body& body) {
#pragma omp parallel num_threads(threads)
  {
    const int64_t parts = omp_get_num_threads(), me = omp_get_thread_num();
    for (int64_t g = 0; g < num_segments; ++g) {
      const ChunkSegment& segment = segments[g];
      const ChunkStore& store = call.stores[call.blocks[segment.block].store];
      const int64_t begin = segment.start + segment.count * me / parts;
      const int64_t end = segment.start + segment.count * (me + 1) / parts;
      if (begin < end) body(store, segment.block, begin, end);
    }
  }
}

constexpr int64_t kTile = 32;

// Calls body(i, key, slot) for ids [begin, end): homes of a tile are fetched before it is searched.
template <class Body>
void find_tile(const ChunkCall& call, const ChunkStore& store, int64_t block, const int64_t* ids,
               int64_t begin, int64_t end, const Body& body) {
  uint64_t keys[kTile];
  int64_t slots[kTile];
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t n = std::min(kTile, end - tile);
    for (int64_t i = 0; i < n; ++i) {
      keys[i] = chunk_key(call, store, block, ids[tile + i]);
      __builtin_prefetch(key_address(store, home_of(store, keys[i])));
    }
    for (int64_t i = 0; i < n; ++i) {
      slots[i] = find_slot(store, keys[i]);
      if (slots[i] >= 0) __builtin_prefetch(value_at(store, slots[i]));
    }
    for (int64_t i = 0; i < n; ++i) body(tile + i, keys[i], slots[i]);
  }
}

}  // namespace

int64_t chunk_held_bytes(const ChunkStore& store) {
  return held_with(store, store.slots, store.committed, store.free);
}

void chunk_find(const ChunkCall& call, const ChunkSegment* segments, int64_t num_segments,
                const int64_t* ids, int64_t* slots, int threads) {
  for_ids(call, segments, num_segments, threads,
          [&](const ChunkStore& store, int64_t block, int64_t begin, int64_t end) {
            find_tile(call, store, block, ids, begin, end,
                      [&](int64_t i, uint64_t, int64_t slot) { slots[i] = slot; });
          });
}

void chunk_places(const ChunkCall& call, const ChunkSegment* segments, int64_t num_segments,
                  const int64_t* ids, int64_t stride, int64_t* places, int threads) {
  for_ids(call, segments, num_segments, threads,
          [&](const ChunkStore& store, int64_t block, int64_t begin, int64_t end) {
            find_tile(call, store, block, ids, begin, end, [&](int64_t i, uint64_t, int64_t slot) {
              const Place* from = slot < 0 ? nullptr : places_of(value_at(store, slot));
              for (int64_t k = 0; k < store.chunks; ++k)
                places[k * stride + i] = from ? from[k] : -1;
            });
          });
}

void chunk_touch(const ChunkCall& call, const ChunkOffers& in, int threads) {
  for_ids(call, in.segments, in.num_segments, threads,
          [&](const ChunkStore& store, int64_t b, int64_t begin, int64_t end) {
            find_tile(call, store, b, in.ids, begin, end, [&](int64_t i, uint64_t, int64_t slot) {
              if (slot < 0) return;
              char* value = value_at(store, slot);
              uint16_t* utilities = utilities_of(store, value);
              for (int64_t k = 0; k < store.chunks; ++k) {
                const float norm = in.norms[i * in.stride + k];
                if (places_of(value)[k] < 0 || norm < 0) continue;
                const uint64_t word = chunk_word(call.blocks[b], in.key, in.ids[i], k);
                if (norm > 0)
                  utilities[k] =
                      utility_code(utility_of(utilities[k]) + norm * in.weights[b], word);
                utilities[k] |= kMarked;
              }
            });
          });
}

void chunk_count(const ChunkCall& call, int64_t number, const ChunkSlice& slice, float decay,
                 int64_t* bins, int64_t* dims, int64_t dims_stride) {
  const ChunkStore& store = call.stores[number];
  for_slice(call, number, slice.number, slice.slices, [&](int64_t b, int64_t row, int64_t,
                                                          char* value) {
    int64_t present = 0;
    for (int64_t k = 0; k < store.chunks; ++k) {
      if (places_of(value)[k] < 0) continue;
      ++present;
      const float u = ranked(utility_of(utilities_of(store, value)[k]), decay, call.blocks[b], row,
                             k);
      ++bins[b * kUtilityBins + cell_code(u, 0)];
    }
    ++dims[b * dims_stride + present];
  });
}

void chunk_decide(const ChunkCall& call, int64_t number, float decay, const float* thresholds,
                  uint64_t key, int64_t* evicted, ChunkLog* log) {
  ChunkStore& store = call.stores[number];
  int64_t empty = 0;
  uint8_t* cells = (uint8_t*)store.sketch;
  const int64_t size = store.sketch_lines * kLine;
  for (int64_t c = 0; c < size; ++c) cells[c] = decayed_cell(cells[c], c, decay, key);
  for_slots(call, number, [&](int64_t b, int64_t row, int64_t slot, char* value) {
    const ChunkBlock& block = call.blocks[b];
    uint16_t* utilities = utilities_of(store, value);
    int64_t present = 0, gone = 0;
    int64_t* entry = log ? note_row(*log, store, b, row, slot) : nullptr;
    for (int64_t k = 0; k < store.chunks; ++k) {
      if (places_of(value)[k] < 0) continue;
      const float utility = utility_of(utilities[k]);
      if (ranked(utility, decay, block, row, k) >= thresholds[b]) {
        const uint16_t mark = utilities[k] & kMarked;
        utilities[k] = utility_code(utility * decay, chunk_word(block, key, row, k)) | mark;
        ++present;
        continue;
      }
      count_gone(store, chunk_hash(store, b, row), k, utility * decay);
      leave(store, slot, k);
      ++gone;
    }
    evicted[b] += gone;
    if (entry && gone) entry[2] = present, ++log->count;
    if (!present) {
      set_key(store, slot, 0);
      ++empty;
    }
  });
  if (empty) {
    store.rows -= empty;
    if (store.rows * 2 < store.slots)
      resize(store, fitting_slots(store, store.rows));
    else
      close_gaps(store);
  }
}

int64_t chunk_compact(ChunkStore& store, bool tight, int64_t* moves) {
  int64_t moved = 0;
  const int64_t taken = store.shared + store.used;
  int32_t *stack = stack_of(store), *end = stack + store.free;
  int32_t* holes = std::partition(stack, end, [&](int32_t place) { return place >= taken; });
  std::sort(holes, end);
  const int64_t span = span_of(store.slots);
  for (int64_t s = 0; holes < end && s < span; ++s) {
    if (!key_at(store, s)) continue;
    for (int64_t k = 0; k < store.chunks; ++k) {
      Place& place = places_of(value_at(store, s))[k];
      if (place < taken) continue;
      const int64_t to = *holes++;
      if (store.payload) {
        std::memcpy((char*)store.payload + to * store.payload_bytes,
                    (char*)store.payload + place * store.payload_bytes, store.payload_bytes);
        std::memcpy((char*)store.state + to * store.state_bytes,
                    (char*)store.state + place * store.state_bytes, store.state_bytes);
      }
      if (moves) moves[2 * moved] = place, moves[2 * moved + 1] = to;
      ++moved;
      place = (int32_t)to;
    }
  }
  const int64_t before = store.committed;
  release(store.stack, 0, 4 * store.free);
  store.free = 0;
  store.top = taken;
  store.committed = std::min((taken + store.slab - 1) / store.slab * store.slab, store.max_chunks);
  // Where the budget is short, the slots that there are do.
  const int64_t slots = fitting_slots(store, store.rows);
  resize(store, tight ? slots : std::min(slots, store.slots));
  for (int64_t more; !tight && store.committed < before; store.committed = more) {
    more = std::min(store.committed + store.slab, before);
    if (grown(store, store.slots, more) > store.budget) break;
  }
  if (store.payload) {
    release(store.payload, store.committed * store.payload_bytes, before * store.payload_bytes);
    release(store.state, store.committed * store.state_bytes, before * store.state_bytes);
  }
  return moved;
}

void chunk_load(ChunkStore& store, const uint64_t* keys, const char* values, int64_t n) {
  clear_slots(store, 0, span_of(store.slots));
  store.rows = n;
  store.slots = fitting_slots(store, n);
  const int64_t start = span_of(store.slots) - 1 - n;
  for (int64_t i = 0; i < n; ++i) {
    set_key(store, start + i, keys[i]);
    std::memcpy(value_at(store, start + i), values + i * value_bytes(store), value_bytes(store));
  }
  if (!spread(store, n)) resize(store, store.slots + store.slots / kGrowth + kFewSlots);
}

void chunk_insert(const ChunkCall& call, int64_t block, const int64_t* rows, int64_t n,
                  int32_t* places, const uint16_t* utilities) {
  ChunkStore& store = call.stores[call.blocks[block].store];
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t key = chunk_key(call, store, block, rows[i]);
    int64_t slot = find_slot(store, key);
    for (int64_t k = 0; k < store.chunks; ++k) {
      int32_t& place = places[i * store.chunks + k];
      if (place < 0) continue;
      bool room = has_place(store);
      if (room && slot < 0) {
        if (has_slot(store)) slot = insert(store, key);
        room = slot >= 0;
      }
      place = room ? take_place(store) : -1;
      if (!room) continue;
      clear_place(store, place);
      places_of(value_at(store, slot))[k] = place;
      utilities_of(store, value_at(store, slot))[k] = utilities[i * store.chunks + k];
    }
  }
}

int64_t chunk_list(const ChunkCall& call, int64_t block, int64_t* rows, char* values) {
  const int64_t number = call.blocks[block].store;
  const int64_t bytes = value_bytes(call.stores[number]);
  int64_t count = 0;
  for_slots(call, number, [&](int64_t b, int64_t row, int64_t, char* value) {
    if (b != block) return;
    if (rows) {
      rows[count] = row;
      std::memcpy(values + count * bytes, value, bytes);
    }
    ++count;
  });
  return count;
}

}  // namespace shardlab
