#include "chunk_store.h"

#include <omp.h>
#include <sys/mman.h>

#include <algorithm>

#include "chunk_sketch.h"
#include "chunk_slots.h"

namespace shardlab {
namespace {

constexpr int64_t kPage = 4096;
// At most 7 of 8 slots are taken; a sixteenth is added at a time. Longest runs stay far below the
// tail.
constexpr int64_t kLoadNumber = 7, kLoadOf = 8, kGrowth = 16, kFewSlots = 32;
constexpr int64_t kTailShift = 4, kMostTail = 1024;
// Rows from which a chunk that goes is chosen: the least of 8 is among the lowest ninth on average.
constexpr int64_t kDrawn = 8;

int64_t pages(int64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }
// Slots of homes, and those behind the last home; the last of all stays empty.
int64_t span_of(int64_t slots) {
  return slots + kFewSlots + std::min(slots >> kTailShift, kMostTail);
}

int64_t held_with(const ChunkStore& s, int64_t slots, int64_t committed) {
  const int64_t span = span_of(slots);
  return pages(8 * span) + pages(value_bytes(s) * span) + pages(4 * s.free) +
         pages(committed * s.payload_bytes) + pages(committed * s.state_bytes) +
         pages(s.sketch_lines * kLine);
}

int64_t fitting_slots(const ChunkStore& s, int64_t rows) {
  return std::min(rows * kLoadOf / kLoadNumber + kFewSlots, s.max_slots);
}

// ---------------------------------------------------------------- index
void clear_slots(ChunkStore& s, int64_t from, int64_t to) {
  if (from < to) std::memset(keys_of(s) + from, 0, 8 * (to - from));
}

void move_slots(ChunkStore& s, int64_t target, int64_t source, int64_t count) {
  std::memmove(keys_of(s) + target, keys_of(s) + source, 8 * count);
  std::memmove(value_at(s, target), value_at(s, source), value_bytes(s) * count);
}

void release(int64_t address, int64_t from, int64_t to) {
  const int64_t first = pages(address + from), last = (address + to) / kPage * kPage;
  if (first < last) madvise((void*)first, last - first, MADV_DONTNEED);
}

// n rows lie at the end of the span: puts everyone at his home, or behind his forerunner.
bool spread(ChunkStore& s, int64_t n) {
  uint64_t* keys = keys_of(s);
  int64_t next = 0, from = span_of(s.slots) - 1 - n;
  for (int64_t i = 0; i < n; ++i, ++from) {
    const int64_t to = std::max((int64_t)scaled(keys[from], s.slots), next);
    if (to > from) return false;
    if (to < from) {
      keys[to] = keys[from];
      std::memcpy(value_at(s, to), value_at(s, from), value_bytes(s));
      keys[from] = 0;
    }
    next = to + 1;
  }
  return true;
}

// The index with another number of slots, in place.
void resize(ChunkStore& s, int64_t slots) {
  const int64_t before = span_of(s.slots);
  for (bool done = false; !done; slots += slots / kGrowth + kFewSlots) {
    uint64_t* keys = keys_of(s);
    int64_t n = 0;
    const int64_t old = span_of(s.slots);
    for (int64_t from = 0; from < old; ++from) {
      if (!keys[from]) continue;
      if (n != from) {
        keys[n] = keys[from];
        std::memcpy(value_at(s, n), value_at(s, from), value_bytes(s));
      }
      ++n;
    }
    clear_slots(s, n, old);
    s.slots = slots;
    const int64_t span = span_of(slots), start = span - 1 - n;
    move_slots(s, start, 0, n);
    clear_slots(s, 0, std::min(n, start));
    keys[span - 1] = 0;
    s.rows = n;
    done = spread(s, n);
  }
  release(s.keys, 8 * span_of(s.slots), 8 * before);
  release(s.values, value_bytes(s) * span_of(s.slots), value_bytes(s) * before);
}

// Room in the index for one more row.
bool has_slot(ChunkStore& s) {
  if ((s.rows + 1) * kLoadOf <= s.slots * kLoadNumber) return true;
  const int64_t slots = s.slots + s.slots / kGrowth + kFewSlots;
  if (slots > s.max_slots || held_with(s, slots, s.committed) > s.budget) return false;
  resize(s, slots);
  return true;
}

// Slot of a new row with no chunk; -1 where a run reaches the end of the array.
int64_t insert(ChunkStore& s, uint64_t key) {
  uint64_t* keys = keys_of(s);
  int64_t at = (int64_t)scaled(key, s.slots);
  while (keys[at] && keys[at] < key) ++at;
  int64_t gap = at;
  while (keys[gap]) ++gap;
  if (gap >= span_of(s.slots) - 1) return -1;
  if (gap > at) move_slots(s, at + 1, at, gap - at);
  keys[at] = key;
  char* value = value_at(s, at);
  std::fill_n(places_of(value), s.chunks, -1);
  std::fill_n(utilities_of(s, value), s.chunks, (uint16_t)0);
  ++s.rows;
  return at;
}

// A row goes: those behind it move up to their homes, or towards them.
void erase(ChunkStore& s, int64_t slot) {
  const uint64_t* keys = keys_of(s);
  int64_t end = slot + 1;
  while (keys[end] && (int64_t)scaled(keys[end], s.slots) < end) ++end;
  move_slots(s, slot, slot + 1, end - slot - 1);
  keys_of(s)[end - 1] = 0;
  --s.rows;
}

// ---------------------------------------------------------------- pool
int32_t* stack_of(const ChunkStore& s) { return (int32_t*)s.stack; }

bool has_place(ChunkStore& s) {
  if (s.free || s.top < s.committed) return true;
  const int64_t more = std::min(s.committed + s.slab, s.max_chunks);
  if (more == s.committed || held_with(s, s.slots, more) > s.budget) return false;
  s.committed = more;
  return true;
}

int32_t take_place(ChunkStore& s) {
  const int32_t place = s.free ? stack_of(s)[--s.free] : (int32_t)s.top++;
  if (s.payload) {
    std::memset((char*)s.payload + place * s.payload_bytes, 0, s.payload_bytes);
    std::memset((char*)s.state + place * s.state_bytes, 0, s.state_bytes);
  }
  ++s.used;
  return place;
}

// A chunk goes: its place is free, its utility counted in the sketch.
void leave(ChunkStore& s, int64_t slot, int64_t chunk, float utility) {
  const uint64_t key = keys_of(s)[slot];
  if (s.sketch_lines) cells_of(line_of(s, key), key, chunk).raise(cell_code(utility, 0));
  int32_t& place = places_of(value_at(s, slot))[chunk];
  stack_of(s)[s.free++] = place;
  place = -1;
  utilities_of(s, value_at(s, slot))[chunk] = 0;
  --s.used;
}

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
void find_tile(const ChunkStore& store, int64_t block, const int64_t* ids, int64_t begin,
               int64_t end, const Body& body) {
  uint64_t keys[kTile];
  int64_t slots[kTile];
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t n = std::min(kTile, end - tile);
    for (int64_t i = 0; i < n; ++i) {
      keys[i] = chunk_key(store, block, ids[tile + i]);
      __builtin_prefetch(keys_of(store) + scaled(keys[i], store.slots));
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
  return held_with(store, store.slots, store.committed);
}

void chunk_find(const ChunkCall& call, const ChunkSegment* segments, int64_t num_segments,
                const int64_t* ids, int64_t* slots, int threads) {
  for_ids(call, segments, num_segments, threads,
          [&](const ChunkStore& store, int64_t block, int64_t begin, int64_t end) {
            find_tile(store, block, ids, begin, end,
                      [&](int64_t i, uint64_t, int64_t slot) { slots[i] = slot; });
          });
}

void chunk_places(const ChunkCall& call, const ChunkSegment* segments, int64_t num_segments,
                  const int64_t* ids, int64_t stride, int64_t* places, int threads) {
  for_ids(call, segments, num_segments, threads,
          [&](const ChunkStore& store, int64_t block, int64_t begin, int64_t end) {
            find_tile(store, block, ids, begin, end, [&](int64_t i, uint64_t, int64_t slot) {
              const int32_t* from = slot < 0 ? nullptr : places_of(value_at(store, slot));
              for (int64_t k = 0; k < store.chunks; ++k)
                places[k * stride + i] = from ? from[k] : -1;
            });
          });
}

void chunk_touch(const ChunkCall& call, const ChunkOffers& in, int threads) {
  for_ids(call, in.segments, in.num_segments, threads,
          [&](const ChunkStore& store, int64_t b, int64_t begin, int64_t end) {
            find_tile(store, b, in.ids, begin, end, [&](int64_t i, uint64_t, int64_t slot) {
              if (slot < 0) return;
              char* value = value_at(store, slot);
              uint16_t* utilities = utilities_of(store, value);
              for (int64_t k = 0; k < store.chunks; ++k) {
                const float norm = in.norms[i * in.stride + k];
                if (places_of(value)[k] < 0 || norm <= 0) continue;
                const uint64_t word = chunk_word(call.blocks[b], in.key, in.ids[i], k);
                utilities[k] = utility_code(utility_of(utilities[k]) + norm * in.weights[b], word);
              }
            });
          });
}

namespace {

// The rows of a tile that have absent chunks to offer.
struct OfferTile {
  int64_t count = 0, rows[kTile];
  uint64_t keys[kTile];

  void collect(const ChunkStore& store, int64_t block, const ChunkOffers& in, int64_t begin,
               int64_t end) {
    count = 0;
    for (int64_t i = begin; i < end; ++i) {
      const float* norms = in.norms + i * in.stride;
      if (std::none_of(norms, norms + store.chunks, [](float x) { return x > 0; })) continue;
      rows[count] = i;
      const uint64_t key = keys[count++] = chunk_key(store, block, in.ids[i]);
      __builtin_prefetch(keys_of(store) + scaled(key, store.slots));
      if (store.sketch_lines) __builtin_prefetch(line_of(store, key), 1);
    }
  }
};

// The least useful chunk of kDrawn rows that follow a random hash.
struct Victim {
  int64_t slot = -1, chunk = 0, block = 0;
  float worth = 0;
};

// own: is left alone. whole: only rows with a single chunk, whose slot becomes free.
Victim draw(const ChunkStore& store, int64_t own_block, uint64_t own, uint64_t hash, bool whole) {
  const uint64_t* keys = keys_of(store);
  const int64_t span = span_of(store.slots);
  int64_t slot = (int64_t)scaled(hash, store.slots);
  while (keys[slot] && keys[slot] < hash) ++slot;
  Victim least;
  for (int64_t seen = 0; seen < std::min(kDrawn, store.rows); ++slot) {
    while (slot == span || !keys[slot]) slot = slot == span ? 0 : slot + 1;
    ++seen;
    if (keys[slot] == own) continue;
    char* value = value_at(store, slot);
    const int32_t* places = places_of(value);
    if (whole && std::count_if(places, places + store.chunks, [](int32_t p) { return p >= 0; }) > 1)
      continue;
    const int64_t block =
        store.wide ? own_block : (int64_t)((chunk_unmix(keys[slot]) - 1) >> kTagShift);
    for (int64_t k = 0; k < store.chunks; ++k) {
      const float worth = utility_of(utilities_of(store, value)[k]);
      if (places[k] >= 0 && (least.slot < 0 || worth < least.worth)) least = {slot, k, block, worth};
    }
  }
  return least;
}

// Room for one more chunk, of a row that has a slot or not: free room, or a victim's. Slots may
// move. `found` tells whether there was free room.
bool make_room(ChunkStore& store, const ChunkOffers& in, int64_t b, uint64_t key, float utility,
               uint64_t word, bool known, bool& found) {
  const bool slot = known || has_slot(store);
  found = slot && has_place(store);
  if (found) return true;
  const Victim victim = draw(store, b, key, chunk_mix(word + kGolden), !slot);
  if (victim.slot < 0 || utility < victim.worth * in.margins[b]) return false;
  leave(store, victim.slot, victim.chunk,
        utility_of(utilities_of(store, value_at(store, victim.slot))[victim.chunk]));
  const int32_t* places = places_of(value_at(store, victim.slot));
  if (std::all_of(places, places + store.chunks, [](int32_t p) { return p < 0; }))
    erase(store, victim.slot);
  ++in.evicted[victim.block];
  return true;
}

// Offers the absent chunks of a row; returns how many were admitted.
int64_t offer_row(ChunkStore& store, const ChunkBlock& block, const ChunkOffers& in, int64_t b,
                  int64_t i, uint64_t key, int64_t* admitted, bool& replaced) {
  const float* norms = in.norms + i * in.stride;
  const float threshold = in.thresholds[b] * in.weights[b];
  // A negative norm tells a chunk that is present, and so a row that is.
  bool known = std::any_of(norms, norms + store.chunks, [](float x) { return x < 0; }) &&
               find_slot(store, key) >= 0;
  int64_t count = 0;
  for (int64_t k = 0; k < store.chunks; ++k) {
    if (norms[k] <= 0) continue;
    const uint64_t word = chunk_word(block, in.key, in.ids[i], k);
    const Cells cells =
        store.sketch_lines ? cells_of(line_of(store, key), key, k) : Cells{nullptr, nullptr};
    const float utility = (store.sketch_lines ? cells.value() : 0) + norms[k] * in.weights[b];
    int64_t slot = -1;
    if (utility >= threshold) {
      bool found = false;
      const bool room = make_room(store, in, b, key, utility, word, known, found);
      store.refused += !found;
      if (room) slot = known ? find_slot(store, key) : insert(store, key);
      replaced |= room && !found;
    }
    if (slot < 0) {
      if (store.sketch_lines)
        cells.raise(cell_code(utility, (word >> 16) & ((1u << kCellShift) - 1)));
      continue;
    }
    known = true;
    const int32_t place = take_place(store);
    places_of(value_at(store, slot))[k] = place;
    utilities_of(store, value_at(store, slot))[k] = utility_code(utility, word);
    int64_t* out = admitted + 3 * count++;
    out[0] = i, out[1] = k, out[2] = place;
  }
  return count;
}

// Drops admitted chunks that were replaced since; returns how many are left.
int64_t still_there(const ChunkCall& call, const ChunkOffers& in, int64_t* admitted,
                    int64_t count) {
  int64_t left = 0, n = 0;
  for (int64_t g = 0; g < in.num_segments; ++g) {
    const ChunkSegment& segment = in.segments[g];
    const ChunkStore& store = call.stores[call.blocks[segment.block].store];
    for (; n < count && admitted[3 * n] < segment.start + segment.count; ++n) {
      const int64_t* one = admitted + 3 * n;
      const int64_t slot = find_slot(store, chunk_key(store, segment.block, in.ids[one[0]]));
      if (slot >= 0 && places_of(value_at(store, slot))[one[1]] == one[2])
        std::copy_n(one, 3, admitted + 3 * left++);
    }
  }
  return left;
}

}  // namespace

int64_t chunk_offer(const ChunkCall& call, const ChunkOffers& in, int64_t* admitted) {
  int64_t count = 0;
  bool replaced = false;
  OfferTile tile;
  for (int64_t g = 0; g < in.num_segments; ++g) {
    const ChunkSegment& segment = in.segments[g];
    const int64_t end = segment.start + segment.count;
    ChunkStore& store = call.stores[call.blocks[segment.block].store];
    for (int64_t first = segment.start; first < end; first += kTile) {
      tile.collect(store, segment.block, in, first, std::min(first + kTile, end));
      for (int64_t i = 0; i < tile.count; ++i)
        count += offer_row(store, call.blocks[segment.block], in, segment.block, tile.rows[i],
                           tile.keys[i], admitted + 3 * count, replaced);
    }
  }
  return replaced ? still_there(call, in, admitted, count) : count;
}

namespace {

// Calls body(block, row, slot, value) for the rows of a store.
template <class Body>
void for_slots(const ChunkCall& call, int64_t number, const Body& body) {
  const ChunkStore& store = call.stores[number];
  int64_t only = 0;  // a wide store's block
  while (only < call.num_blocks && call.blocks[only].store != number) ++only;
  const int64_t span = span_of(store.slots);
  for (int64_t s = 0; s < span; ++s) {
    if (!keys_of(store)[s]) continue;
    const uint64_t at = chunk_unmix(keys_of(store)[s]) - 1;
    const int64_t block = store.wide ? only : (int64_t)(at >> kTagShift);
    const int64_t row = (int64_t)(store.wide ? at : at & ((1ULL << kTagShift) - 1));
    body(block, row, s, value_at(store, s));
  }
}

// A utility as decisions see it: those of chunks that nobody asked for differ by chance.
float ranked(float utility, float decay, const ChunkBlock& block, int64_t row, int64_t chunk) {
  const uint64_t word = chunk_word(block, 0, row, chunk);
  return std::max(utility * decay, (float)(word >> 40) * 0x1p-24f * kLeastUtility);
}

}  // namespace

void chunk_count(const ChunkCall& call, int64_t number, float decay, int64_t* bins, int64_t* dims,
                 int64_t dims_stride) {
  const ChunkStore& store = call.stores[number];
  for_slots(call, number, [&](int64_t b, int64_t row, int64_t, char* value) {
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
                  uint64_t key, int64_t* evicted) {
  ChunkStore& store = call.stores[number];
  int64_t empty = 0;
  uint8_t* cells = (uint8_t*)store.sketch;
  const int64_t size = store.sketch_lines * kLine;
  for (int64_t c = 0; c < size; ++c)
    if (cells[c]) {
      const uint64_t word = chunk_mix(key + (uint64_t)c * kGolden);
      cells[c] = cell_code(cell_value(cells[c]) * decay, (word >> 16) & ((1u << kCellShift) - 1));
    }
  for_slots(call, number, [&](int64_t b, int64_t row, int64_t slot, char* value) {
    const ChunkBlock& block = call.blocks[b];
    uint16_t* utilities = utilities_of(store, value);
    int64_t present = 0;
    for (int64_t k = 0; k < store.chunks; ++k) {
      int32_t& place = places_of(value)[k];
      if (place < 0) continue;
      const float utility = utility_of(utilities[k]);
      if (ranked(utility, decay, block, row, k) >= thresholds[b]) {
        utilities[k] = utility_code(utility * decay, chunk_word(block, key, row, k));
        ++present;
        continue;
      }
      leave(store, slot, k, utility * decay);
      ++evicted[b];
    }
    if (!present) {
      keys_of(store)[slot] = 0;
      ++empty;
    }
  });
  if (empty) {
    const int64_t rows = store.rows - empty;
    resize(store, rows * 2 < store.slots ? fitting_slots(store, rows) : store.slots);
  }
}

int64_t chunk_compact(ChunkStore& store, bool tight, int64_t* moves) {
  int64_t moved = 0;
  int32_t *stack = stack_of(store), *end = stack + store.free;
  int32_t* holes = std::partition(stack, end, [&](int32_t place) { return place >= store.used; });
  std::sort(holes, end);
  const int64_t span = span_of(store.slots);
  for (int64_t s = 0; holes < end && s < span; ++s) {
    if (!keys_of(store)[s]) continue;
    for (int64_t k = 0; k < store.chunks; ++k) {
      int32_t& place = places_of(value_at(store, s))[k];
      if (place < store.used) continue;
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
  store.top = store.used;
  store.committed = std::min((store.used + store.slab - 1) / store.slab * store.slab,
                             store.max_chunks);
  resize(store, fitting_slots(store, store.rows));
  for (int64_t more; !tight && store.committed < before; store.committed = more) {
    more = std::min(store.committed + store.slab, before);
    if (held_with(store, store.slots, more) > store.budget) break;
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
  std::memcpy(keys_of(store) + start, keys, 8 * n);
  std::memcpy(value_at(store, start), values, value_bytes(store) * n);
  if (!spread(store, n)) resize(store, store.slots + store.slots / kGrowth + kFewSlots);
}

void chunk_insert(const ChunkCall& call, int64_t block, const int64_t* rows, int64_t n,
                  int32_t* places, const uint16_t* utilities) {
  ChunkStore& store = call.stores[call.blocks[block].store];
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t key = chunk_key(store, block, rows[i]);
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
