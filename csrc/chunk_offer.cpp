// What becomes of absent chunks that were asked for: counted, admitted, in place of others.
#include <algorithm>

#include "chunk_index.h"

namespace shardlab {
namespace {

constexpr int64_t kTile = 32;
// Rows from which a chunk that goes is chosen: the least of 8 is among the lowest ninth on average.
constexpr int64_t kDrawn = 8;

// Where the rows that are drawn for a row begin.
uint64_t draw_hash(const ChunkOffers& in, uint64_t key) { return chunk_mix(key ^ in.key); }

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
      if (!store.refused) continue;
      const int64_t drawn = (int64_t)scaled(draw_hash(in, key), store.slots);
      __builtin_prefetch(keys_of(store) + drawn);
      for (int64_t at = 0; at < kDrawn * value_bytes(store); at += kLine)
        __builtin_prefetch(value_at(store, drawn) + at);
    }
  }
};

// The least useful chunk of kDrawn rows that follow a random hash.
struct Victim {
  int64_t slot = -1, chunk = 0, block = 0;
  float worth = 0;
  bool whole = false;
};


// own: is left alone. whole: only rows with a single chunk, whose slot becomes free.
Victim draw(const ChunkStore& store, int64_t own_block, uint64_t own, uint64_t hash, bool whole) {
  const uint64_t* keys = keys_of(store);
  const int64_t span = span_of(store.slots);
  int64_t slot = (int64_t)scaled(hash, store.slots);
  while (keys[slot] && keys[slot] < hash) ++slot;
  Victim least{-1, 0, 0, 0, whole};
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
      if (places[k] >= 0 && (least.slot < 0 || worth < least.worth)) least = {slot, k, block, worth, whole};
    }
  }
  return least;
}

// Room for one more chunk, of a row that has a slot or not: free room, or a victim's. Slots may
// move. `victim` is that of the row's last chunk that found no room, if nothing changed since.
// Returns 0 for no room, 1 for a victim's, 2 for free room.
int make_room(ChunkStore& store, const ChunkOffers& in, int64_t b, uint64_t key, float utility,
              bool known, Victim& victim) {
  const bool slot = known || has_slot(store);
  if (slot && has_place(store)) return 2;
  if (victim.slot < 0 || victim.whole == slot)
    victim = draw(store, b, key, draw_hash(in, key), !slot);
  if (victim.slot < 0 || utility < victim.worth * in.margins[b]) return 0;
  leave(store, victim.slot, victim.chunk,
        utility_of(utilities_of(store, value_at(store, victim.slot))[victim.chunk]));
  const int32_t* places = places_of(value_at(store, victim.slot));
  if (std::all_of(places, places + store.chunks, [](int32_t p) { return p < 0; }))
    erase(store, victim.slot);
  ++in.evicted[victim.block];
  victim = {};
  return 1;
}

// Offers the absent chunks of a row; returns how many were admitted.
int64_t offer_row(ChunkStore& store, const ChunkBlock& block, const ChunkOffers& in, int64_t b,
                  int64_t i, uint64_t key, int64_t* admitted, bool& replaced) {
  const float* norms = in.norms + i * in.stride;
  const float threshold = in.thresholds[b] * in.weights[b];
  // A negative norm tells a chunk that is present, and so a row that is.
  bool known = std::any_of(norms, norms + store.chunks, [](float x) { return x < 0; }) &&
               find_slot(store, key) >= 0;
  Victim victim;
  int64_t count = 0;
  for (int64_t k = 0; k < store.chunks; ++k) {
    if (norms[k] <= 0) continue;
    const uint64_t word = chunk_word(block, in.key, in.ids[i], k);
    const Cells cells =
        store.sketch_lines ? cells_of(line_of(store, key), key, k) : Cells{nullptr, nullptr};
    const float utility = (store.sketch_lines ? cells.value() : 0) + norms[k] * in.weights[b];
    int64_t slot = -1;
    if (utility >= threshold) {
      const int room = make_room(store, in, b, key, utility, known, victim);
      store.refused += room != 2;
      if (room) {
        slot = known ? find_slot(store, key) : insert(store, key);
        victim = {};
      }
      replaced |= room == 1;
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

}  // namespace shardlab
