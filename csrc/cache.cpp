// Placing rows in set-associative caches. Two passes over the ids of a block: the first finds the
// rows that are there, the second brings up the others without touching a slot that this call uses.
// So a row that the batch needs never leaves for another one that it needs.
//
// Every thread owns a range of the sets and takes their ids in order: the result does not depend on
// the number of threads. Slots in use are noted beside the index, for sets with misses only.
//
// Source: own; sets of tags before the first touch of a row, and slots in use that stay, as in the
// cached embeddings of arXiv 2010.11305.
#include "cache.h"

#include <omp.h>

#include <queue>
#include <span>
#include <vector>

#include "cache_placer.h"

namespace shardlab {
namespace {

constexpr int64_t kSerialIds = 4096;  // with fewer, starting threads costs more than they save

std::vector<int64_t> first_entries(const CacheCall& call) {
  std::vector<int64_t> first{0};
  for (int64_t s = 0; s < call.num_segments; ++s)
    first.push_back(first.back() + call.segments[s].count);
  return first;
}

template <class F>
void with_sets(const CacheCall& call, int64_t segment, F&& f) {
  const CacheBlock& block = call.blocks[call.segments[segment].block];
  if (block.tag_bytes == 2)
    f(Sets<uint16_t>(block, call.meta));
  else
    f(Sets<uint32_t>(block, call.meta));
}

// Which owner has each entry: ranges of the sets of all segments, one behind the other.
void partition(const CacheCall& call, const std::vector<int64_t>& first, int64_t begin,
               int64_t end, std::vector<std::vector<int64_t>>& lists) {
  int64_t total = 0;
  for (int64_t s = 0; s < call.num_segments; ++s) total += call.blocks[call.segments[s].block].sets;
  const double share = (double)lists.size() / (double)total;
  int64_t passed = 0;
  for (int64_t s = 0; s < call.num_segments; ++s) {
    with_sets(call, s, [&](const auto& sets) {
      const int64_t* ids = call.ids + call.segments[s].start - first[s];
      for (int64_t e = std::max(begin, first[s]); e < std::min(end, first[s + 1]); ++e) {
        const auto owner = (size_t)((double)(passed + sets.locate(ids[e]).set) * share);
        lists[std::min(owner, lists.size() - 1)].push_back(e);
      }
    });
    passed += call.blocks[call.segments[s].block].sets;
  }
}

void place_segment(const CacheCall& call, int64_t segment, int64_t first, Owner& owner,
                   int64_t* places, const Entries& entries) {
  if (!entries.count) return;
  if (call.blocks[call.segments[segment].block].tag_bytes == 2)
    Placer<uint16_t>(call, segment, first, owner, places).place(entries);
  else
    Placer<uint32_t>(call, segment, first, owner, places).place(entries);
}

void place_owned(const CacheCall& call, const std::vector<int64_t>& first, Owner& owner,
                 int64_t* places) {
  const auto& list = owner.entries;
  auto from = list.begin();
  for (int64_t s = 0; s < call.num_segments; ++s) {
    const auto to = std::lower_bound(from, list.end(), first[s + 1]);
    place_segment(call, s, first[s], owner, places, {list.data() + (from - list.begin()), 0,
                                                     to - from});
    from = to;
  }
}

void place_in_parallel(const CacheCall& call, const std::vector<int64_t>& first,
                       std::span<Owner> owners, int64_t* places) {
  const int64_t parts = (int64_t)owners.size(), n = first.back();
  std::vector<std::vector<std::vector<int64_t>>> lists(
      parts, std::vector<std::vector<int64_t>>(parts));
#pragma omp parallel num_threads((int)parts)
  {
#pragma omp for schedule(static, 1)
    for (int64_t p = 0; p < parts; ++p)
      partition(call, first, n * p / parts, n * (p + 1) / parts, lists[p]);
#pragma omp for schedule(static, 1)
    for (int64_t o = 0; o < parts; ++o) {
      for (int64_t p = 0; p < parts; ++p)
        owners[o].entries.insert(owners[o].entries.end(), lists[p][o].begin(), lists[p][o].end());
      place_owned(call, first, owners[o], places);
    }
  }
}

// Calls f on the owners' events in the order of their entries.
template <class Event, class F>
void merge(std::span<Owner> owners, std::vector<Event> Owner::*events, F&& f) {
  using Head = std::pair<int64_t, size_t>;  // entry, owner
  std::priority_queue<Head, std::vector<Head>, std::greater<Head>> heads;
  std::vector<size_t> next(owners.size(), 0);
  const auto push = [&](size_t o) {
    if (next[o] < (owners[o].*events).size()) heads.push({(owners[o].*events)[next[o]].entry, o});
  };
  for (size_t o = 0; o < owners.size(); ++o) push(o);
  while (!heads.empty()) {
    const size_t o = heads.top().second;
    heads.pop();
    f((owners[o].*events)[next[o]++]);
    push(o);
  }
}

// Writes the lists and counters, and numbers the staging rows.
class Lists {
 public:
  Lists(const CacheCall& call, const std::vector<int64_t>& first, std::span<Owner> owners,
        const CacheOutput& out)
      : call_(call), first_(first), owners_(owners), out_(out), sums_(call.num_segments) {}

  CacheCounts write() {
    merge(owners_, &Owner::fills, [this](const Fill& fill) { write_fill(fill); });
    merge(owners_, &Owner::evictions, [this](const Eviction& e) { write_eviction(e); });
    for (const Owner& owner : owners_)
      for (const Repeat& repeat : owner.repeats) {
        const int64_t segment =
            std::upper_bound(first_.begin(), first_.end(), repeat.entry) - first_.begin() - 1;
        place(repeat.entry, segment) = place(repeat.first, segment);
      }
    for (int64_t s = 0; s < call_.num_segments; ++s) count(s);
    return counts_;
  }

 private:
  struct Sums {
    int64_t misses, staged, evictions;
  };

  int64_t& place(int64_t entry, int64_t segment) const {
    return out_.places[call_.segments[segment].start + entry - first_[segment]];
  }

  void write_fill(const Fill& fill) {
    const int64_t block = call_.segments[fill.segment].block;
    Sums& sums = sums_[fill.segment];
    int64_t slot = fill.slot;
    if (slot < 0) {
      slot = call_.blocks[block].sets * call_.blocks[block].ways + sums.staged++;
      place(fill.entry, fill.segment) = slot;
    } else {
      ++out_.occupied[block];
    }
    ++sums.misses;
    int64_t* target = out_.fills + 3 * counts_.fills++;
    target[0] = block, target[1] = fill.row, target[2] = slot;
  }

  void write_eviction(const Eviction& eviction) {
    const int64_t block = call_.segments[eviction.segment].block;
    --out_.occupied[block];
    ++sums_[eviction.segment].evictions;
    int64_t* target = out_.evictions + 4 * counts_.evictions++;
    target[0] = block, target[1] = eviction.slot;
    target[2] = eviction.row, target[3] = eviction.dirty;
  }

  void count(int64_t segment) const {
    const auto& [block, start, ids] = call_.segments[segment];
    const Sums& sums = sums_[segment];
    int64_t refused = 0;
    for (const Owner& owner : owners_) refused += owner.refused[segment];
    const int64_t free = call_.blocks[block].sets * call_.blocks[block].ways - out_.occupied[block];
    int64_t* counters = out_.counters + block * kCounters;
    counters[kHits] += ids - sums.misses;
    counters[kMisses] += sums.misses;
    counters[kConflicts] += std::min(sums.staged - refused + sums.evictions, free);
    counters[kEvictions] += sums.evictions;
    counters[kRefused] += refused;
    counters[kStaged] += sums.staged;
  }

  const CacheCall& call_;
  const std::vector<int64_t>& first_;
  std::span<Owner> owners_;
  const CacheOutput& out_;
  std::vector<Sums> sums_;
  CacheCounts counts_{0, 0};
};

}  // namespace

int64_t cache_check(const CacheCall& call, int64_t num_blocks, int64_t num_ids) {
  int64_t last = -1;
  for (int64_t s = 0; s < call.num_segments; ++s) {
    const auto& [block, start, count] = call.segments[s];
    if (block <= last || block >= num_blocks || start < 0 || count < 0 || start > num_ids - count)
      return -2 - s;
    last = block;
  }
  for (int64_t s = 0; s < call.num_segments; ++s) {
    const CacheSegment& segment = call.segments[s];
    const uint64_t rows = (uint64_t)call.blocks[segment.block].rows;
    uint64_t largest = 0;
    for (int64_t i = 0; i < segment.count; ++i)
      largest = std::max(largest, (uint64_t)call.ids[segment.start + i]);
    if (largest < rows) continue;
    for (int64_t i = segment.start; i < segment.start + segment.count; ++i)
      if ((uint64_t)call.ids[i] >= rows) return i;
  }
  return -1;
}

CacheCounts cache_place(const CacheCall& call, const CacheOutput& out, int threads) {
  thread_local std::vector<Owner> owners;
  const std::vector<int64_t> first = first_entries(call);
  const size_t parts = first.back() < kSerialIds ? 1 : (size_t)threads;
  if (owners.size() < parts) owners.resize(parts);
  const std::span<Owner> active(owners.data(), parts);
  for (Owner& owner : active) owner.clear(call.num_segments);
  if (parts == 1)
    for (int64_t s = 0; s < call.num_segments; ++s)
      place_segment(call, s, first[s], active[0], out.places,
                    {nullptr, first[s], call.segments[s].count});
  else
    place_in_parallel(call, first, active, out.places);
  return Lists(call, first, active, out).write();
}

void cache_lookup(const CacheCall& call, int64_t* places, int threads) {
  for (int64_t s = 0; s < call.num_segments; ++s)
    with_sets(call, s, [&]<class Tag>(const Sets<Tag>& sets) {
      const CacheSegment& segment = call.segments[s];
      const int64_t parts = segment.count < kSerialIds ? 1 : threads;
#pragma omp parallel for num_threads((int)parts)
      for (int64_t p = 0; p < parts; ++p) {
        const int64_t begin = segment.start + segment.count * p / parts;
        const int64_t end = segment.start + segment.count * (p + 1) / parts;
        visit(
            sets, end - begin, [&](int64_t i) { return call.ids[begin + i]; },
            [&](int64_t i, const Spot& spot) {
              const int way = sets.find(spot.set, (Tag)spot.tag);
              places[begin + i] = way < 0 ? -1 : spot.set * sets.ways() + way;
            });
      }
    });
}

}  // namespace shardlab
