// The parts of a store that change as chunks come and go: index, pool, and a chunk's leaving.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <vector>

#include "chunk_sketch.h"
#include "chunk_slots.h"

namespace shardlab {

constexpr int64_t kPage = 4096;
// A sixteenth of the slots is added at a time. Longest runs stay far below the tail.
constexpr int64_t kGrowth = 16, kFewSlots = 32;
// A store of rows of several chunks keeps bytes for a stack of this part of its places.
constexpr int64_t kReserve = 16;
constexpr int64_t kTailShift = 4, kMostTail = 1024;

inline int64_t pages(int64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }
// Slots of homes, and those behind the last home; the last of all stays empty.
inline int64_t span_of(int64_t slots) {
  return slots + kFewSlots + std::min(slots >> kTailShift, kMostTail);
}

// Bytes of an index of so many slots, those behind the last home with them.
inline int64_t index_bytes(const ChunkStore& s, int64_t span) {
  if (s.chunks == 1) return pages(s.key_stride * span);
  return pages(s.key_stride * span) + pages(s.value_stride * span);
}

// Bytes with a stack of some depth.
inline int64_t held_with(const ChunkStore& s, int64_t slots, int64_t committed, int64_t depth) {
  return index_bytes(s, span_of(slots)) + pages(4 * depth) + pages(committed * s.payload_bytes) +
         pages(committed * s.state_bytes) + pages(s.sketch_lines * kLine);
}

// Bytes that a store must have before it grows to this: a row of several chunks that makes way for
// one of fewer leaves places behind, and the stack needs pages for them.
inline int64_t grown(const ChunkStore& s, int64_t slots, int64_t committed) {
  const int64_t reserve = s.chunks > 1 ? committed / kReserve + s.chunks : 0;
  return held_with(s, slots, committed, std::max(s.free, reserve));
}

inline int64_t fitting_slots(const ChunkStore& s, int64_t rows) {
  return std::min(rows * s.load / (s.load - 1) + kFewSlots, s.max_slots);
}

// ---------------------------------------------------------------- index
inline void clear_slots(ChunkStore& s, int64_t from, int64_t to) {
  if (from < to) std::memset(key_address(s, from), 0, s.key_stride * (to - from));
}

inline void move_slots(ChunkStore& s, int64_t target, int64_t source, int64_t count) {
  std::memmove(key_address(s, target), key_address(s, source), s.key_stride * count);
  if (s.chunks > 1)
    std::memmove(value_at(s, target), value_at(s, source), s.value_stride * count);
}

inline void release(int64_t address, int64_t from, int64_t to) {
  const int64_t first = pages(address + from), last = (address + to) / kPage * kPage;
  if (first < last) madvise((void*)first, last - first, MADV_DONTNEED);
}

// n rows lie at the end of the span: puts everyone at his home, or behind his forerunner.
inline bool spread(ChunkStore& s, int64_t n) {
  int64_t next = 0, from = span_of(s.slots) - 1 - n;
  for (int64_t i = 0; i < n; ++i, ++from) {
    const int64_t to = std::max(home_of(s, key_at(s, from)), next);
    if (to > from) return false;
    if (to < from) {
      move_slots(s, to, from, 1);
      set_key(s, from, 0);
    }
    next = to + 1;
  }
  return true;
}

// The index with another number of slots, in place.
inline void resize(ChunkStore& s, int64_t slots) {
  const int64_t before = span_of(s.slots);
  for (bool done = false; !done; slots += slots / kGrowth + kFewSlots) {
    int64_t n = 0;
    const int64_t old = span_of(s.slots);
    for (int64_t from = 0; from < old; ++from) {
      if (!key_at(s, from)) continue;
      if (n != from) move_slots(s, n, from, 1);
      ++n;
    }
    clear_slots(s, n, old);
    s.slots = slots;
    const int64_t span = span_of(slots), start = span - 1 - n;
    move_slots(s, start, 0, n);
    clear_slots(s, 0, std::min(n, start));
    set_key(s, span - 1, 0);
    s.rows = n;
    done = spread(s, n);
  }
  release(s.keys, s.key_stride * span_of(s.slots), s.key_stride * before);
  if (s.chunks > 1)
    release(s.values, s.value_stride * span_of(s.slots), s.value_stride * before);
}

// Rows have gone, and left gaps: those behind them move up to their homes, or towards them.
inline void close_gaps(ChunkStore& s) {
  const int64_t span = span_of(s.slots);
  int64_t next = 0;
  for (int64_t from = 0; from < span; ++from) {
    const uint64_t key = key_at(s, from);
    if (!key) continue;
    const int64_t to = std::max(home_of(s, key), next);
    if (to < from) {
      move_slots(s, to, from, 1);
      set_key(s, from, 0);
    }
    next = to + 1;
  }
}

// Room in the index for one more row.
inline bool has_slot(ChunkStore& s) {
  if ((s.rows + 1) * s.load <= s.slots * (s.load - 1)) return true;
  const int64_t slots = s.slots + s.slots / kGrowth + kFewSlots;
  if (slots > s.max_slots || grown(s, slots, s.committed) > s.budget) return false;
  resize(s, slots);
  return true;
}

// Slot of a new row with no chunk; -1 where a run reaches the end of the array.
inline int64_t insert(ChunkStore& s, uint64_t key) {
  const int64_t at = first_slot(s, key);
  int64_t gap = at;
  while (key_at(s, gap)) ++gap;
  if (gap >= span_of(s.slots) - 1) return -1;
  if (gap > at) move_slots(s, at + 1, at, gap - at);
  set_key(s, at, key);
  char* value = value_at(s, at);
  std::fill_n(places_of(value), s.chunks, -1);
  std::fill_n(utilities_of(s, value), s.chunks, (uint16_t)0);
  ++s.rows;
  return at;
}

// A row goes: those behind it move up to their homes, or towards them.
inline void erase(ChunkStore& s, int64_t slot) {
  int64_t end = slot + 1;
  for (uint64_t key; (key = key_at(s, end)) && home_of(s, key) < end;) ++end;
  move_slots(s, slot, slot + 1, end - slot - 1);
  set_key(s, end - 1, 0);
  --s.rows;
}

// Which rows the keys of a store stand for.
class RowNames {
 public:
  RowNames(const ChunkCall& call, int64_t number)
      : store_(call.stores[number]), is_narrow_(is_narrow(store_)) {
    for (int64_t b = 0; b < call.num_blocks; ++b)
      if (call.blocks[b].store == number) {
        blocks_.push_back(b);
        before_.push_back(call.blocks[b].rows_before);
      }
  }

  struct Name {
    int64_t block, row;
  };

  Name of(uint64_t key) const {
    if (is_narrow_) {
      const int64_t at = (int64_t)chunk_unmix32((uint32_t)key) - 1;
      const int64_t n = last_before(at);
      return {blocks_[n], at - before_[n]};
    }
    const uint64_t at = chunk_unmix(key) - 1;
    if (store_.wide) return {blocks_[0], (int64_t)at};
    return {(int64_t)(at >> kTagShift), (int64_t)(at & ((1ULL << kTagShift) - 1))};
  }

 private:
  // The last shard with no more rows before it, without a branch: rows come in the order of hashes,
  // so that none could be foretold.
  int64_t last_before(int64_t at) const {
    const int64_t* found = before_.data();
    for (int64_t n = (int64_t)before_.size(); n > 1; n -= n / 2)
      found = found[n / 2] <= at ? found + n / 2 : found;
    return found - before_.data();
  }

  const ChunkStore& store_;
  bool is_narrow_;
  std::vector<int64_t> blocks_, before_;
};

// The first key of a slice; that of the slice behind the last one is the greatest number.
inline uint64_t slice_start(const ChunkStore& store, int64_t slice, int64_t slices) {
  const int bits = 8 * (int)store.key_bytes;
  if (slice >= slices) return ~0ULL >> (64 - bits);
  return (uint64_t)(((unsigned __int128)slice << bits) / (uint64_t)slices);
}

// Calls body(block, row, slot, value) for the rows of a store whose keys lie in a slice of as many
// equal ones: a sample by chance, since keys are hashes.
template <class Body>
inline void for_slice(const ChunkCall& call, int64_t number, int64_t slice, int64_t slices,
                      const Body& body) {
  const ChunkStore& store = call.stores[number];
  const RowNames names(call, number);
  const uint64_t first = slice_start(store, slice, slices);
  const uint64_t last = slice_start(store, slice + 1, slices);
  const bool is_last = slice + 1 >= slices;
  const int64_t span = span_of(store.slots), home = home_of(store, last);
  for (int64_t s = home_of(store, first); s < span; ++s) {
    const uint64_t key = key_at(store, s);
    if (!key) {
      if (!is_last && s >= home) break;
      continue;
    }
    if (key < first) continue;
    if (!is_last && key >= last) break;
    const auto [block, row] = names.of(key);
    body(block, row, s, value_at(store, s));
  }
}

template <class Body>
inline void for_slots(const ChunkCall& call, int64_t number, const Body& body) {
  for_slice(call, number, 0, 1, body);
}

// ---------------------------------------------------------------- pool
inline int32_t* stack_of(const ChunkStore& s) { return (int32_t*)s.stack; }

inline bool has_place(ChunkStore& s) {
  if (s.free || s.top < s.committed) return true;
  const int64_t more = std::min(s.committed + s.slab, s.max_chunks);
  if (more == s.committed || grown(s, s.slots, more) > s.budget) return false;
  s.committed = more;
  return true;
}

// A place for one more chunk; what it held before is still there.
inline int32_t take_place(ChunkStore& s) {
  ++s.used;
  return s.free ? stack_of(s)[--s.free] : (int32_t)s.top++;
}

inline void clear_place(const ChunkStore& s, int64_t place) {
  if (!s.payload) return;
  std::memset((char*)s.payload + place * s.payload_bytes, 0, s.payload_bytes);
  std::memset((char*)s.state + place * s.state_bytes, 0, s.state_bytes);
}

// Where the log takes a row, as it is; it is there once the caller has counted it.
inline int64_t* note_row(ChunkLog& log, const ChunkStore& s, int64_t block, int64_t row,
                         int64_t slot) {
  int64_t* entry = log.rows + log.stride * log.count;
  entry[0] = block, entry[1] = row;
  std::memcpy(entry + 3, value_at(s, slot), value_bytes(s));
  return entry;
}

// The utility of a chunk that goes is counted in the sketch.
inline void count_gone(const ChunkStore& s, uint64_t hash, int64_t chunk, float utility) {
  if (!s.sketch_lines) return;
  cells_of(line_of(s, hash), hash, chunk).raise(cell_code(utility, 0));
  mark_line(s, hash);
}

// A chunk of a row goes: its place is free.
inline void leave(ChunkStore& s, int64_t slot, int64_t chunk) {
  Place& place = places_of(value_at(s, slot))[chunk];
  stack_of(s)[s.free++] = place;
  place = -1;
  utilities_of(s, value_at(s, slot))[chunk] = 0;
  --s.used;
}

}  // namespace shardlab
