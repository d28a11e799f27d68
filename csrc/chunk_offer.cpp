// What becomes of absent chunks that were asked for: counted, admitted, in place of others.
#include <algorithm>
#include <vector>

#include "chunk_index.h"

namespace shardlab {
namespace {

// Rows from which a chunk that goes is chosen: the least of 8 is among the lowest ninth on average.
constexpr int64_t kDrawn = 8;

// Where the rows that are drawn for a row begin.
uint64_t draw_hash(const ChunkOffers& in, uint64_t key) { return chunk_mix(key ^ in.key); }

// A row with absent chunks that were asked for, and their cells in the sketch.
struct Offer {
  int64_t row;
  uint64_t key;
  Cells* cells;  // [chunks]
};

// The offers of a segment, some of them ahead of the one that is worked on: its line of the sketch
// is fetched first, then, if it may be worth a place, its home, and in a full store the rows that
// are drawn for it.
class OfferQueue {
 public:
  OfferQueue(const ChunkStore& store, const ChunkOffers& in, const ChunkSegment& segment)
      : store_(store), in_(in), block_(segment.block), cells_((kMask + 1) * store.chunks) {
    const int64_t end = segment.start + segment.count;
    for (int64_t i = segment.start; i < end; ++i) {
      const float* norms = in.norms + i * in.stride;
      if (std::any_of(norms, norms + store.chunks, [](float x) { return x > 0; }))
        rows_.push_back(i);
    }
    for (int64_t n = -2 * kStage; n < 0; ++n) {
      start(n + 2 * kStage);
      if (n + kStage >= 0) weigh(n + kStage);
    }
  }

  int64_t size() const { return (int64_t)rows_.size(); }
  // Offer n; they come one after the other.
  Offer next(int64_t n) {
    start(n + 2 * kStage);
    weigh(n + kStage);
    return {rows_[n], keys_[n & kMask], cells_.data() + (n & kMask) * store_.chunks};
  }

 private:
  static constexpr int64_t kStage = 8, kMask = 4 * kStage - 1;

  void start(int64_t n) {
    if (n >= size()) return;
    const uint64_t key = keys_[n & kMask] = chunk_key(store_, block_, in_.ids[rows_[n]]);
    if (store_.sketch_lines) __builtin_prefetch(line_of(store_, key), 1);
  }

  void weigh(int64_t n) {
    if (n >= size()) return;
    const uint64_t key = keys_[n & kMask];
    const float* norms = in_.norms + rows_[n] * in_.stride;
    uint8_t* line = store_.sketch_lines ? line_of(store_, key) : nullptr;
    Cells* cells = cells_.data() + (n & kMask) * store_.chunks;
    float most = 0;
    for (int64_t k = 0; k < store_.chunks; ++k) {
      if (norms[k] <= 0) continue;
      float utility = norms[k] * in_.weights[block_];
      if (line) {
        cells[k] = cells_of(line, key, k);
        utility += cells[k].value();
      }
      most = std::max(most, utility);
    }
    if (most < in_.thresholds[block_] * in_.weights[block_]) return;
    __builtin_prefetch(keys_of(store_) + scaled(key, store_.slots));
    if (!store_.refused) return;
    const int64_t drawn = (int64_t)scaled(draw_hash(in_, key), store_.slots);
    __builtin_prefetch(keys_of(store_) + drawn);
    for (int64_t at = 0; at < kDrawn * value_bytes(store_); at += kLine)
      __builtin_prefetch(value_at(store_, drawn) + at);
  }

  const ChunkStore& store_;
  const ChunkOffers& in_;
  int64_t block_;
  std::vector<int64_t> rows_;
  std::vector<Cells> cells_;
  uint64_t keys_[kMask + 1];
};

// The least useful chunk of kDrawn rows that follow a random hash, or, for the sake of its slot, the
// row whose most useful chunk is least (chunk -1).
struct Victim {
  int64_t slot = -1, chunk = 0;
  float worth = 0;
  bool whole = false;
};

// Chunks of a row that may leave at once: their places go on the stack, which takes whole pages.
int64_t most_leaving(const ChunkStore& store) {
  ChunkStore deeper = store;
  deeper.free += store.chunks;
  return held_with(deeper, store.slots, store.committed) <= store.budget ? store.chunks : 1;
}

// Utilities are compared as the bits of bf16 without their mark: none is negative. Most draws find
// no victim that is worth less, so that rows are weighed without a branch.
constexpr uint32_t kNoWorth = 1 << 16;
inline uint32_t worth_of(uint16_t utility) { return utility & (kMarked - 1); }

// Of a row's least useful chunk.
uint32_t least_of(const ChunkStore& store, int64_t slot) {
  char* value = value_at(store, slot);
  const int32_t* places = places_of(value);
  const uint16_t* utilities = utilities_of(store, value);
  uint32_t least = kNoWorth;
  for (int64_t k = 0; k < store.chunks; ++k)
    least = std::min(least, places[k] < 0 ? kNoWorth : worth_of(utilities[k]));
  return least;
}

// Of the most useful chunk of a row, if no more than `most` are present.
uint32_t best_of(const ChunkStore& store, int64_t slot, int64_t most) {
  char* value = value_at(store, slot);
  const int32_t* places = places_of(value);
  const uint16_t* utilities = utilities_of(store, value);
  uint32_t best = 0;
  int64_t present = 0;
  for (int64_t k = 0; k < store.chunks; ++k) {
    best = std::max(best, places[k] < 0 ? 0u : worth_of(utilities[k]));
    present += places[k] >= 0;
  }
  return present <= most ? best : kNoWorth;
}

// own: is left alone.
Victim draw(const ChunkStore& store, uint64_t own, uint64_t hash, bool whole) {
  const uint64_t* keys = keys_of(store);
  const int64_t span = span_of(store.slots), most = whole ? most_leaving(store) : store.chunks;
  int64_t slot = (int64_t)scaled(hash, store.slots);
  while (keys[slot] && keys[slot] < hash) ++slot;
  int64_t at = -1;
  uint32_t least = kNoWorth;
  for (int64_t seen = 0; seen < std::min(kDrawn, store.rows); ++slot) {
    while (slot == span || !keys[slot]) slot = slot == span ? 0 : slot + 1;
    ++seen;
    const uint32_t worth = whole ? best_of(store, slot, most) : least_of(store, slot);
    if (keys[slot] == own || worth >= least) continue;
    least = worth;
    at = slot;
  }
  if (at < 0) return {-1, 0, 0, whole};
  int64_t chunk = -1;
  if (!whole) {
    const int32_t* places = places_of(value_at(store, at));
    const uint16_t* utilities = utilities_of(store, value_at(store, at));
    do ++chunk;
    while (places[chunk] < 0 || worth_of(utilities[chunk]) != least);
  }
  return {at, chunk, utility_of((uint16_t)least), whole};
}

// A victim of a block goes; returns how many chunks.
int64_t replace(ChunkStore& store, const Victim& victim, int64_t block, int64_t row,
                ChunkLog* log) {
  char* value = value_at(store, victim.slot);
  int64_t* entry = log ? note_row(*log, store, block, row, victim.slot) : nullptr;
  int64_t gone = 0, left = 0;
  for (int64_t k = 0; k < store.chunks; ++k) {
    if (places_of(value)[k] < 0) continue;
    if (victim.chunk >= 0 && victim.chunk != k) {
      ++left;
      utilities_of(store, value)[k] |= kMarked;
      continue;
    }
    leave(store, victim.slot, k, utility_of(utilities_of(store, value)[k]));
    ++gone;
  }
  if (entry) entry[2] = left, ++log->count;
  if (!left) erase(store, victim.slot);
  return gone;
}

// Room for one more chunk, of a row that has a slot or not: free room, or a victim's. Slots may
// move. `victim` is that of the row's last chunk that found no room, if nothing changed since.
// Returns 0 for no room, 1 for a victim's, 2 for free room.
int make_room(ChunkStore& store, const ChunkOffers& in, int64_t b, uint64_t key, float utility,
              bool known, Victim& victim) {
  const bool slot = known || has_slot(store);
  if (slot && has_place(store)) return 2;
  if (victim.slot < 0 || victim.whole == slot) victim = draw(store, key, draw_hash(in, key), !slot);
  if (victim.slot < 0 || utility < victim.worth * in.margins[b]) return 0;
  const uint64_t at = chunk_unmix(keys_of(store)[victim.slot]) - 1;
  const int64_t owner = store.wide ? b : (int64_t)(at >> kTagShift);
  const int64_t row = (int64_t)(store.wide ? at : at & ((1ULL << kTagShift) - 1));
  in.evicted[owner] += replace(store, victim, owner, row, in.log);
  victim = {};
  return 1;
}

// Offers the absent chunks of a row; returns how many were admitted.
int64_t offer_row(ChunkStore& store, const ChunkBlock& block, const ChunkOffers& in, int64_t b,
                  const Offer& offer, int64_t* admitted, bool& replaced) {
  const int64_t i = offer.row;
  const uint64_t key = offer.key;
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
    const Cells& cells = offer.cells[k];
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
      if (store.sketch_lines) {
        cells.raise(cell_code(utility, (word >> 16) & ((1u << kCellShift) - 1)));
        mark_line(store, key);
      }
      continue;
    }
    known = true;
    const int32_t place = take_place(store);
    places_of(value_at(store, slot))[k] = place;
    utilities_of(store, value_at(store, slot))[k] = utility_code(utility, word) | kMarked;
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
  for (int64_t g = 0; g < in.num_segments; ++g) {
    const ChunkSegment& segment = in.segments[g];
    ChunkStore& store = call.stores[call.blocks[segment.block].store];
    OfferQueue queue(store, in, segment);
    for (int64_t n = 0; n < queue.size(); ++n)
      count += offer_row(store, call.blocks[segment.block], in, segment.block, queue.next(n),
                         admitted + 3 * count, replaced);
  }
  return replaced ? still_there(call, in, admitted, count) : count;
}

}  // namespace shardlab
