// What becomes of absent chunks that were asked for: counted, admitted, in place of others.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "chunk_index.h"

namespace shardlab {
namespace {

// Rows from which a chunk that goes is chosen: the least of 8 is among the lowest ninth on average.
constexpr int64_t kDrawn = 8;
// Offers that the chunk found so is held against before others are drawn: where few offers are worth
// more than it, most draws would be in vain.
constexpr int64_t kHeldAgainst = 8;

// A row with absent chunks that were asked for, and their cells in the sketch.
struct Offer {
  int64_t row;
  uint64_t key, hash;
  Cells* cells;  // [chunks]
};

// The offers of a segment, some of them ahead of the one that is worked on: its line of the sketch
// is fetched first, then, if it may be worth a place, its home.
class OfferQueue {
 public:
  OfferQueue(const ChunkCall& call, const ChunkStore& store, const ChunkOffers& in,
             const ChunkSegment& segment)
      : call_(call), store_(store), in_(in), block_(segment.block), cells_((kMask + 1) * store.chunks) {
    rows_.resize(segment.count);
    // Without a branch: which rows are absent, nothing foretells.
    for (int64_t i = segment.start; i < segment.start + segment.count; ++i) {
      const float* norms = in.norms + i * in.stride;
      bool is_offered = false;
      for (int64_t k = 0; k < store.chunks; ++k) is_offered |= norms[k] > 0;
      rows_[size_] = i;
      size_ += is_offered;
    }
    for (int64_t n = -2 * kStage; n < 0; ++n) {
      start(n + 2 * kStage);
      if (n + kStage >= 0) weigh(n + kStage);
    }
  }

  int64_t size() const { return size_; }
  // Offer n; they come one after the other.
  Offer next(int64_t n) {
    start(n + 2 * kStage);
    weigh(n + kStage);
    return {rows_[n], keys_[n & kMask], hashes_[n & kMask], cells_.data() + (n & kMask) * store_.chunks};
  }

 private:
  static constexpr int64_t kStage = 8, kMask = 4 * kStage - 1;

  void start(int64_t n) {
    if (n >= size()) return;
    const int64_t row = in_.ids[rows_[n]];
    const uint64_t hash = hashes_[n & kMask] = chunk_hash(store_, block_, row);
    keys_[n & kMask] = chunk_key(call_, store_, block_, row);
    if (store_.sketch_lines) __builtin_prefetch(line_of(store_, hash), 1);
  }

  void weigh(int64_t n) {
    if (n >= size()) return;
    const uint64_t hash = hashes_[n & kMask];
    const float* norms = in_.norms + rows_[n] * in_.stride;
    uint8_t* line = store_.sketch_lines ? line_of(store_, hash) : nullptr;
    Cells* cells = cells_.data() + (n & kMask) * store_.chunks;
    float most = 0;
    for (int64_t k = 0; k < store_.chunks; ++k) {
      if (norms[k] <= 0) continue;
      float utility = norms[k] * in_.weights[block_];
      if (line) {
        cells[k] = cells_of(line, hash, k);
        utility += cells[k].value();
      }
      most = std::max(most, utility);
    }
    if (most < in_.thresholds[block_] * in_.weights[block_]) return;
    prefetch_run(store_, keys_[n & kMask]);
  }

  const ChunkCall& call_;
  const ChunkStore& store_;
  const ChunkOffers& in_;
  int64_t block_, size_ = 0;
  std::vector<int64_t> rows_;
  std::vector<Cells> cells_;
  uint64_t keys_[kMask + 1], hashes_[kMask + 1];
};

// A chunk that was replaced; its utility is counted in the sketch behind all offers of a call.
struct Gone {
  ChunkStore* store;
  uint64_t hash;
  int64_t chunk;
  float utility;
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
  const int64_t depth = store.free + store.chunks;
  return held_with(store, store.slots, store.committed, depth) <= store.budget ? store.chunks : 1;
}

// Utilities are compared as the bits of bf16 without their mark: none is negative. Most draws find
// no victim that is worth less, so that rows are weighed without a branch.
constexpr uint32_t kNoWorth = 1 << 16;
inline uint32_t worth_of(uint16_t utility) { return utility & (kMarked - 1); }

// Calls body with the number of chunks as a constant where it is a usual one, else with 0: rows are
// then weighed without a loop.
template <class Body>
inline auto with_chunks(int64_t chunks, const Body& body) {
  switch (chunks) {
    case 1: return body(std::integral_constant<int64_t, 1>{});
    case 2: return body(std::integral_constant<int64_t, 2>{});
    case 4: return body(std::integral_constant<int64_t, 4>{});
    default: return body(std::integral_constant<int64_t, 0>{});
  }
}

// Of a row's least useful chunk.
inline uint32_t least_of(const Place* places, const uint16_t* utilities, int64_t chunks) {
  uint32_t least = kNoWorth;
  for (int64_t k = 0; k < chunks; ++k)
    least = std::min(least, worth_of(utilities[k]) | ((uint32_t)(places[k] >> 31) & kNoWorth));
  return least;
}

// Of the most useful chunk of a row, if no more than `most` are present. Absent ones have 0.
inline uint32_t best_of(const Place* places, const uint16_t* utilities, int64_t chunks,
                        int64_t most) {
  uint32_t best = 0;
  for (int64_t k = 0; k < chunks; ++k) best = std::max(best, worth_of(utilities[k]));
  if (most >= chunks) return best;
  int64_t present = 0;
  for (int64_t k = 0; k < chunks; ++k) present += places[k] >= 0;
  return present <= most ? best : kNoWorth;
}

// The row that goes, and what it is worth.
struct Drawn {
  int64_t slot = -1;
  uint32_t worth = kNoWorth;
};

// Of the kDrawn rows from a key on; the row of `own` is left alone.
template <int64_t N>
Drawn draw_row(const ChunkStore& store, uint64_t own, uint64_t start, bool whole) {
  const int64_t chunks = N ? N : store.chunks, bytes = store.value_stride;
  const int64_t span = span_of(store.slots), most = whole ? most_leaving(store) : chunks;
  Drawn found;
  int64_t slot = first_slot(store, start);
  for (int64_t seen = 0; seen < std::min(kDrawn, store.rows); ++slot) {
    while (slot == span || !key_at(store, slot)) slot = slot == span ? 0 : slot + 1;
    ++seen;
    const Place* places = places_of((char*)store.values + slot * bytes);
    const uint16_t* utilities = (const uint16_t*)(places + chunks);
    const uint32_t worth = whole ? best_of(places, utilities, chunks, most)
                                 : least_of(places, utilities, chunks);
    if (key_at(store, slot) != own && worth < found.worth) found = {slot, worth};
  }
  return found;
}

// own: is left alone.
Victim draw(const ChunkStore& store, uint64_t own, uint64_t start, bool whole) {
  const Drawn drawn = with_chunks(store.chunks, [&](auto n) {
    return draw_row<decltype(n)::value>(store, own, start, whole);
  });
  if (drawn.slot < 0) return {-1, 0, 0, whole};
  int64_t chunk = -1;
  if (!whole) {
    const Place* places = places_of(value_at(store, drawn.slot));
    const uint16_t* utilities = utilities_of(store, value_at(store, drawn.slot));
    do ++chunk;
    while (places[chunk] < 0 || worth_of(utilities[chunk]) != drawn.worth);
  }
  return {drawn.slot, chunk, utility_of((uint16_t)drawn.worth), whole};
}

// What a store gives up for the offers of a call.
class Draws {
 public:
  Draws(const ChunkStore& store, uint64_t key) : store_(store), key_(key) {}

  // The chunk, or row, that makes way if an offer of a row (its key) is worth more.
  const Victim& next(uint64_t own, bool whole) {
    if (offers_ == kHeldAgainst || victim_.whole != whole ||
        (victim_.slot >= 0 && key_at(store_, victim_.slot) == own)) {
      victim_ = draw(store_, own, start_of(drawn_++), whole);
      offers_ = 0;
      fetch();
    }
    ++offers_;
    return victim_;
  }

  // Slots have moved.
  void forget() { offers_ = kHeldAgainst; }

 private:
  // Key at which the rows of a draw begin.
  uint64_t start_of(uint64_t number) const {
    const uint64_t word = chunk_mix(key_ + number * kGolden);
    return is_narrow(store_) ? word >> 32 : word;
  }

  // Of the draw behind the next one the keys, of the next one what its rows hold.
  void fetch() const {
    prefetch_run(store_, start_of(drawn_ + 1));
    const char* rows = value_at(store_, first_slot(store_, start_of(drawn_)));
    const int64_t slots = kDrawn * store_.load / (store_.load - 1) + 1;
    for (int64_t at = 0; at < slots * store_.value_stride; at += kLine) __builtin_prefetch(rows + at);
  }

  const ChunkStore& store_;
  uint64_t key_;
  Victim victim_;
  int64_t drawn_ = 0, offers_ = kHeldAgainst;
};

// What the offers of a segment share.
struct Stage {
  ChunkStore& store;
  const ChunkOffers& in;
  const RowNames& names;
  int64_t block;
  std::vector<Gone>& gone;
  Draws& draws;
};

// A victim of a block goes; returns how many chunks.
int64_t replace(const Stage& stage, const Victim& victim, int64_t block, int64_t row) {
  ChunkStore& store = stage.store;
  ChunkLog* log = stage.in.log;
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
    stage.gone.push_back({&store, chunk_hash(store, block, row), k,
                          utility_of(utilities_of(store, value)[k])});
    leave(store, victim.slot, k);
    ++gone;
  }
  if (entry) entry[2] = left, ++log->count;
  if (!left) erase(store, victim.slot);
  return gone;
}

// Room for one more chunk, of a row that has a slot or not: free room, or a victim's. Slots may
// move.
// Returns 0 for no room, 1 for a victim's, 2 for free room.
int make_room(const Stage& stage, const Offer& offer, float utility, bool known) {
  ChunkStore& store = stage.store;
  const ChunkOffers& in = stage.in;
  const int64_t slots = store.slots;
  const bool slot = known || has_slot(store);
  if (store.slots != slots) stage.draws.forget();
  if (slot && has_place(store)) return 2;
  const Victim& victim = stage.draws.next(offer.key, !slot);
  if (victim.slot < 0 || utility < victim.worth * in.margins[stage.block]) return 0;
  const auto [owner, row] = stage.names.of(key_at(store, victim.slot));
  in.evicted[owner] += replace(stage, victim, owner, row);
  return 1;
}

// Offers the absent chunks of a row; returns how many were admitted.
int64_t offer_row(const Stage& stage, const ChunkBlock& block, const Offer& offer,
                  int64_t* admitted, bool& replaced) {
  ChunkStore& store = stage.store;
  const ChunkOffers& in = stage.in;
  const int64_t i = offer.row, b = stage.block;
  const uint64_t key = offer.key;
  const float* norms = in.norms + i * in.stride;
  const float threshold = in.thresholds[b] * in.weights[b];
  // A negative norm tells a chunk that is present, and so a row that is.
  bool known = std::any_of(norms, norms + store.chunks, [](float x) { return x < 0; }) &&
               find_slot(store, key) >= 0;
  int64_t count = 0;
  for (int64_t k = 0; k < store.chunks; ++k) {
    if (norms[k] <= 0) continue;
    const uint64_t word = chunk_word(block, in.key, in.ids[i], k);
    const Cells& cells = offer.cells[k];
    const float utility = (store.sketch_lines ? cells.value() : 0) + norms[k] * in.weights[b];
    int64_t slot = -1;
    if (utility >= threshold) {
      const int room = make_room(stage, offer, utility, known);
      store.refused += room != 2;
      if (room) {
        slot = known ? find_slot(store, key) : insert(store, key);
        stage.draws.forget();
      }
      replaced |= room == 1;
    }
    if (slot < 0) {
      if (store.sketch_lines) {
        cells.raise(cell_code(utility, (word >> 16) & ((1u << kCellShift) - 1)));
        mark_line(store, offer.hash);
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

// Counts the utilities of chunks that went, their lines fetched ahead.
void count_all(const std::vector<Gone>& gone) {
  constexpr size_t kAhead = 16;
  for (size_t i = 0; i < gone.size() + kAhead; ++i) {
    if (i < gone.size() && gone[i].store->sketch_lines)
      __builtin_prefetch(line_of(*gone[i].store, gone[i].hash), 1);
    if (i < kAhead) continue;
    const Gone& one = gone[i - kAhead];
    count_gone(*one.store, one.hash, one.chunk, one.utility);
  }
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
      const int64_t slot = find_slot(store, chunk_key(call, store, segment.block, in.ids[one[0]]));
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
  std::vector<Gone> gone;
  std::vector<Draws> draws;
  int64_t stores = 0;
  for (int64_t b = 0; b < call.num_blocks; ++b) stores = std::max(stores, call.blocks[b].store + 1);
  for (int64_t n = 0; n < stores; ++n) draws.emplace_back(call.stores[n], in.key);
  for (int64_t g = 0; g < in.num_segments; ++g) {
    const ChunkSegment& segment = in.segments[g];
    ChunkStore& store = call.stores[call.blocks[segment.block].store];
    const RowNames names(call, call.blocks[segment.block].store);
    const Stage stage{store, in, names, segment.block, gone,
                      draws[call.blocks[segment.block].store]};
    OfferQueue queue(call, store, in, segment);
    for (int64_t n = 0; n < queue.size(); ++n)
      count += offer_row(stage, call.blocks[segment.block], queue.next(n), admitted + 3 * count,
                         replaced);
  }
  count_all(gone);
  return replaced ? still_there(call, in, admitted, count) : count;
}

}  // namespace shardlab
