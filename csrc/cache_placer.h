// Placing rows of one block in its sets: the two passes of cache.cpp, for the ids of one thread.
#pragma once
#include <vector>

#include "cache_set.h"

namespace shardlab {

// Sets fetched together, two batches ahead: about as many lines as a core can wait for at once.
constexpr int64_t kBatch = 20;
constexpr size_t kAhead = 16;  // misses ahead to prefetch

// Entries are the ids of all segments, counted through. `list` null: `count` from `first` on.
struct Entries {
  const int64_t* list;
  int64_t first, count;
  int64_t operator[](int64_t i) const { return list ? list[i] : first + i; }
};

struct Miss {
  int64_t entry;
  Spot spot;
};
struct Fill {
  int64_t entry, segment, row, slot;  // slot -1: a staging row
};
struct Eviction {
  int64_t entry, segment, slot, row, dirty;
};
struct Repeat {
  int64_t entry, first;  // the same row, which was staged
};

// Open addressing with linear probing; keys are at least 0. Grow-only, sized for each use.
template <class Value>
class HashTable {
 public:
  void reset(int64_t keys) {
    const size_t size = std::bit_ceil((size_t)keys * 2);
    if (slots_.size() < size) slots_.resize(size);
    std::fill_n(slots_.begin(), size, Slot{-1, {}});
    mask_ = size - 1;
  }
  __attribute__((always_inline)) void prefetch(int64_t key) const {
    __builtin_prefetch(&slots_[home(key)], 1);
  }
  Value* find(int64_t key) {
    Slot& slot = probe(key);
    return slot.key < 0 ? nullptr : &slot.value;
  }
  Value& insert(int64_t key, Value value) {
    Slot& slot = probe(key);
    if (slot.key < 0) slot = {key, value};
    return slot.value;
  }

 private:
  struct Slot {
    int64_t key;
    Value value;
  };
  size_t home(int64_t key) const { return mix((uint32_t)key ^ (uint32_t)(key >> 32)) & mask_; }
  Slot& probe(int64_t key) {
    size_t i = home(key);
    while (slots_[i].key >= 0 && slots_[i].key != key) i = (i + 1) & mask_;
    return slots_[i];
  }
  std::vector<Slot> slots_;
  size_t mask_ = 0;
};

// What one thread finds, and its scratch space.
struct Owner {
  std::vector<int64_t> entries;
  std::vector<Miss> misses;
  std::vector<Fill> fills;
  std::vector<Eviction> evictions;
  std::vector<Repeat> repeats;
  std::vector<int64_t> refused;  // by segment
  HashTable<uint64_t> pins;      // set with a miss -> its ways in use
  std::vector<uint64_t> filter;  // a bit for every set with a miss, and for some others
  HashTable<int64_t> staged;     // row -> entry
  bool any_staged;

  void clear(int64_t segments) {
    entries.clear(), fills.clear(), evictions.clear(), repeats.clear();
    refused.assign(segments, 0);
  }
};

// Calls f(i, spot) for `count` rows, row_at(i), whose sets are fetched two batches ahead.
template <class Tag, class RowAt, class F>
void visit(const Sets<Tag>& sets, int64_t count, RowAt&& row_at, F&& f) {
  Spot spots[2][kBatch];
  const auto locate = [&](int64_t begin, Spot* batch) {
    const int64_t size = std::clamp<int64_t>(count - begin, 0, kBatch);
    for (int64_t i = 0; i < size; ++i) {
      batch[i] = sets.locate(row_at(begin + i));
      sets.prefetch(batch[i].set);
    }
    return size;
  };
  int64_t next = locate(0, spots[0]);
  for (int64_t begin = 0, turn = 0; begin < count; begin += kBatch, turn ^= 1) {
    const int64_t size = next;
    next = locate(begin + kBatch, spots[turn ^ 1]);
    for (int64_t i = 0; i < size; ++i) f(begin + i, spots[turn][i]);
  }
}

// The ids of one owner in one segment.
template <class Tag>
class Placer {
 public:
  Placer(const CacheCall& call, int64_t segment, int64_t first_entry, Owner& owner,
         int64_t* places)
      : call_(call), segment_(segment), block_(call.blocks[call.segments[segment].block]),
        sets_(block_, call.meta), chance_(block_.seed, call.step), owner_(owner),
        ids_(call.ids + call.segments[segment].start - first_entry),
        places_(places + call.segments[segment].start - first_entry),
        lfu_((CachePolicy)block_.policy == CachePolicy::kLfu),
        by_frequency_((CacheAdmission)block_.admission == CacheAdmission::kFrequency) {}

  void place(const Entries& entries) {
    owner_.misses.clear();
    if (lfu_)
      find_hits<true>(entries);
    else
      find_hits<false>(entries);
    if (owner_.misses.empty()) return;
    pin_hits(entries);
    owner_.any_staged = false;
    ahead([this](const Miss& miss) { sets_.prefetch(miss.spot.set); },
          [this](const Miss& miss) { bring_up(miss); });
  }

 private:
  template <bool lfu>
  void find_hits(const Entries& entries) {
    visit(
        sets_, entries.count, [&](int64_t i) { return ids_[entries[i]]; },
        [&](int64_t i, const Spot& spot) {
          const int64_t entry = entries[i];
          const int way = sets_.find(spot.set, (Tag)spot.tag);
          if (way < 0) {
            places_[entry] = -1;
            owner_.misses.push_back({entry, spot});
          } else {
            places_[entry] = spot.set * sets_.ways() + way;
            use<lfu>(spot.set, way);
          }
        });
  }

  template <bool lfu>
  void use(int64_t set, int way) const {
    uint8_t* states = sets_.states(set);
    if (call_.touch) {
      if constexpr (lfu)
        touch_lfu(states, sets_.ways(), way);
      else
        touch_lru(states, sets_.ways(), way);
    }
    states[way] |= call_.write ? kDirty : 0;
  }

  // Calls f on every miss, and g and a prefetch of the set's pins some misses earlier.
  template <class G, class F>
  void ahead(G&& g, F&& f) {
    const auto& misses = owner_.misses;
    for (size_t i = 0; i < misses.size() + kAhead; ++i) {
      if (i < misses.size()) owner_.pins.prefetch(misses[i].spot.set), g(misses[i]);
      if (i >= kAhead) f(misses[i - kAhead]);
    }
  }

  // Notes the ways in use of every set that has a miss.
  void pin_hits(const Entries& entries) {
    const auto& misses = owner_.misses;
    const uint64_t mask = std::bit_ceil(misses.size() * 8 + 64) - 1;
    owner_.filter.assign((mask + 1) / 64, 0);
    owner_.pins.reset((int64_t)misses.size());
    ahead([](const Miss&) {},
          [&](const Miss& miss) {
            const uint64_t set = (uint64_t)miss.spot.set;
            owner_.filter[(set & mask) / 64] |= 1ULL << (set & 63);
            owner_.pins.insert(miss.spot.set, 0);
          });
    if ((int64_t)misses.size() == entries.count) return;
    for (int64_t i = 0; i < entries.count; ++i) {
      const int64_t slot = places_[entries[i]];
      if (slot < 0) continue;
      const int64_t set = sets_.set_of(slot);
      if (!(owner_.filter[((uint64_t)set & mask) / 64] >> (set & 63) & 1)) continue;
      if (uint64_t* pins = owner_.pins.find(set)) *pins |= 1ULL << (slot - set * sets_.ways());
    }
  }

  void bring_up(const Miss& miss) {
    const auto& [entry, spot] = miss;
    const int64_t row = ids_[entry];
    if (const int way = sets_.find(spot.set, (Tag)spot.tag); way >= 0) {
      places_[entry] = spot.set * sets_.ways() + way;  // brought up by an earlier entry
      return;
    }
    if (owner_.any_staged)
      if (const int64_t* first = owner_.staged.find(row)) {
        owner_.repeats.push_back({entry, *first});
        return;
      }
    uint64_t& pins = *owner_.pins.find(spot.set);
    const int way = make_room(entry, row, spot.set, pins);
    if (way < 0) {
      stage(entry, row);
      return;
    }
    sets_.set_tag(spot.set, way, (Tag)spot.tag);
    pins |= 1ULL << way;
    places_[entry] = spot.set * sets_.ways() + way;
    owner_.fills.push_back({entry, segment_, row, places_[entry]});
  }

  // A free way of the set, with the newcomer's state, or -1.
  int make_room(int64_t entry, int64_t row, int64_t set, uint64_t pins) {
    uint8_t* states = sets_.states(set);
    int way = sets_.find(set, Sets<Tag>::kEmpty);
    int count = 1;
    if (way < 0) {
      const uint32_t drawn = chance_.draw(row);
      way = find_victim(states, sets_.ways(), pins, lfu_, Chance::tie_start(drawn, sets_.ways()));
      if (way < 0) return -1;
      if (lfu_) {
        const int weakest = states[way] >> 1;
        if (Chance::decays(drawn)) halve_counts(states, sets_.ways());
        if (by_frequency_) {
          if (!Chance::enters(drawn, weakest)) {
            ++owner_.refused[segment_];
            return -1;
          }
          count = weakest / 2 + 1;
        }
      }
      owner_.evictions.push_back({entry, segment_, set * sets_.ways() + way,
                                  sets_.row(set, sets_.tag(set, way)), states[way] & kDirty});
    }
    const uint8_t dirty = call_.write ? kDirty : 0;
    if (lfu_) {
      states[way] = (uint8_t)(count * kOne | dirty);
    } else {
      touch_lru(states, sets_.ways(), way);
      states[way] = dirty;
    }
    return way;
  }

  void stage(int64_t entry, int64_t row) {
    if (!owner_.any_staged) owner_.staged.reset((int64_t)owner_.misses.size());
    owner_.any_staged = true;
    owner_.staged.insert(row, entry);
    owner_.fills.push_back({entry, segment_, row, -1});
  }

  const CacheCall& call_;
  int64_t segment_;
  const CacheBlock& block_;
  Sets<Tag> sets_;
  Chance chance_;
  Owner& owner_;
  const int64_t* ids_;
  int64_t* places_;
  bool lfu_, by_frequency_;
};

}  // namespace shardlab
