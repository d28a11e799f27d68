// Where rows lie in the index of chunks, looked up some rows ahead of the one that is worked on.
//
// In three stages (Lookup), each of which fetches what the next one reads: waiting for memory
// overlaps with the work on other rows.
#pragma once
#include "chunk_slots.h"
#include "lanes.h"

namespace shardlab::SHARDLAB_ISA {

// Finds the slots of ids [begin, end), some rows ahead of the one that is worked on: the home in the
// index is fetched first, then the slot behind it, then what the slot tells. Spread over the work on
// other rows, these never fill the queue of outstanding lines.
class Lookup {
 public:
  // known: slots of all ids, where they were found before; or null.
  Lookup(const ChunkCall& call, int64_t block, const int64_t* ids, int64_t end,
         const int64_t* known = nullptr)
      : call_(call),
        store_(call.stores[call.blocks[block].store]),
        block_(block),
        ids_(ids),
        known_(known),
        end_(end),
        bytes_(value_bytes(store_)) {}

  // Calls fetch(i, slot) for the first rows; slots are -1 where no chunk is present.
  template <class Fetch>
  SHARDLAB_INLINE void begin(int64_t first, const Fetch& fetch) {
    for (int64_t i = first - 3 * kStage; i < first; ++i) {
      home(i + 3 * kStage);
      if (i + 2 * kStage >= first) find(i + 2 * kStage);
      if (i + kStage >= first) tell(i + kStage, fetch);
    }
  }
  // The slot of row i; rows come one after the other. Calls fetch for a row ahead.
  template <class Fetch>
  SHARDLAB_INLINE int64_t next(int64_t i, const Fetch& fetch) {
    home(i + 3 * kStage);
    find(i + 2 * kStage);
    tell(i + kStage, fetch);
    return slots_[i & kMask];
  }

 private:
  static constexpr int64_t kStage = 8, kMask = 4 * kStage - 1;

  SHARDLAB_INLINE void home(int64_t i) {
    if (known_ || i >= end_) return;
    const uint64_t key = keys_[i & kMask] = chunk_key(call_, store_, block_, ids_[i]);
    prefetch_run(store_, key);
  }
  SHARDLAB_INLINE void find(int64_t i) {
    if (i >= end_) return;
    const int64_t slot = slots_[i & kMask] = known_ ? known_[i]
                                                    : find_slot(store_, keys_[i & kMask]);
    if (slot >= 0) prefetch_write(value_at(store_, slot), bytes_);
  }
  template <class Fetch>
  SHARDLAB_INLINE void tell(int64_t i, const Fetch& fetch) {
    if (i < end_) fetch(i, slots_[i & kMask]);
  }

  const ChunkCall& call_;
  const ChunkStore& store_;
  int64_t block_;
  const int64_t *ids_, *known_;
  int64_t end_, bytes_;
  uint64_t keys_[kMask + 1];
  int64_t slots_[kMask + 1];
};

// Calls fetch(place) for the present chunks of a slot.
template <class Fetch>
SHARDLAB_INLINE inline void for_present(const ChunkStore& store, int64_t slot, const Fetch& fetch) {
  if (slot < 0) return;
  const Place* places = places_of(value_at(store, slot));
  for (int64_t k = 0; k < store.chunks; ++k)
    if (places[k] >= 0) fetch(places[k]);
}

}  // namespace shardlab::SHARDLAB_ISA
