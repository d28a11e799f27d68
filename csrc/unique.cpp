// Radix sort of (id, entry) pairs per segment. Sorting beats hashing here: it leaves the entries
// grouped by id in entry order (the fixed order of summation), the ids sorted (cheaper DRAM access,
// and row blocks become contiguous ranges), and costs 2 to 3 linear passes over data in the L2.
#include "unique.h"

#include <omp.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace shardlab {
namespace {

constexpr int kMaxDigitBits = 11;       // 2048 counters: 16 KiB, half of an L1
constexpr int64_t kMaxPacked = 1LL << 32;  // ids and entry numbers below this share one word

struct Entry {
  uint64_t key;
  uint64_t entry;
};

// Grow-only buffers of the calling thread: fresh ones would fault in their pages every step.
template <class T>
T* scratch(int slot, int64_t size) {
  thread_local std::vector<T> buffers[4];
  auto& buffer = buffers[slot];
  if ((int64_t)buffer.size() < size) buffer.resize(size + size / 4);
  return buffer.data();
}

// Sorts `count` packed words by their upper 32 bits, of which `bits` matter; stable. Returns where
// the sorted words lie (a or b).
uint64_t* radix_sort(uint64_t* a, uint64_t* b, int64_t count, int bits) {
  const int passes = std::max(1, (bits + kMaxDigitBits - 1) / kMaxDigitBits);
  const int digit_bits = (bits + passes - 1) / passes;
  const int64_t buckets = 1LL << digit_bits;
  uint32_t counts[1 << kMaxDigitBits];
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = 32 + pass * digit_bits;
    std::memset(counts, 0, buckets * sizeof(uint32_t));
    for (int64_t i = 0; i < count; ++i) ++counts[(a[i] >> shift) & (buckets - 1)];
    uint32_t total = 0;
    for (int64_t d = 0; d < buckets; ++d) {
      const uint32_t c = counts[d];
      counts[d] = total;
      total += c;
    }
    for (int64_t i = 0; i < count; ++i) b[counts[(a[i] >> shift) & (buckets - 1)]++] = a[i];
    std::swap(a, b);
  }
  return a;
}

int64_t check(int64_t id, int64_t limit, int64_t mode) {
  if ((uint64_t)id < (uint64_t)limit) return id;
  return (Bounds)mode == Bounds::kClampToZero ? 0 : -1;
}

struct Segment {
  int64_t first_chunk = 0, num_chunks = 0, first_entry = 0, entries = 0;
  int64_t kept = 0, uniques = 0, bad = std::numeric_limits<int64_t>::max();
  uint64_t* sorted = nullptr;  // packed words, or null when the ids need 64 bits
};

template <class Id>
struct Task {
  const Id* ids;
  const Chunk* chunks;
  const int64_t *limits, *bounds, *bags;
  uint64_t *a, *b;
  Entry* wide;
  int64_t* source;    // per entry
  int64_t* position;  // per entry

  // Collects a segment's entries; put(id, entry) stores the kept ones.
  template <class Put>
  void collect(int64_t s, Segment& segment, const Put& put) const {
    const int64_t limit = limits[s], mode = bounds[s];
    int64_t entry = segment.first_entry;
    for (int64_t c = 0; c < segment.num_chunks; ++c) {
      const Chunk& chunk = chunks[segment.first_chunk + c];
      for (int64_t i = 0; i < chunk.count; ++i, ++entry) {
        const int64_t p = chunk.start + i, id = check(ids[p], limit, mode);
        source[entry] = chunk.base + (bags ? bags[p] : i) * chunk.step;
        position[entry] = p;
        if (id >= 0)
          put(id, entry);
        else if ((Bounds)mode == Bounds::kError)
          segment.bad = std::min(segment.bad, p);
      }
    }
  }

  void sort(int64_t s, Segment& segment, bool narrow) const {
    uint64_t* out = a + segment.first_entry;
    Entry* wide_out = wide + (narrow ? 0 : segment.first_entry);
    int64_t kept = 0;
    if (narrow) {
      collect(s, segment, [&](int64_t id, int64_t e) { out[kept++] = (uint64_t)id << 32 | e; });
      segment.sorted = radix_sort(out, b + segment.first_entry, kept,
                                  std::bit_width((uint64_t)(limits[s] - 1)));
      for (int64_t i = 0; i < kept; ++i)
        segment.uniques += i == 0 || segment.sorted[i] >> 32 != segment.sorted[i - 1] >> 32;
    } else {
      collect(s, segment, [&](int64_t id, int64_t e) {
        wide_out[kept++] = {(uint64_t)id, (uint64_t)e};
      });
      std::sort(wide_out, wide_out + kept, [](const Entry& x, const Entry& y) {
        return x.key != y.key ? x.key < y.key : x.entry < y.entry;
      });
      for (int64_t i = 0; i < kept; ++i)
        segment.uniques += i == 0 || wide_out[i].key != wide_out[i - 1].key;
    }
    segment.kept = kept;
  }

  void emit(const Segment& segment, int64_t unique, int64_t kept, const UniqueResult& out) const {
    const Entry* wide_in = wide ? wide + segment.first_entry : nullptr;
    int64_t previous = -1;
    for (int64_t i = 0; i < segment.kept; ++i, ++kept) {
      const int64_t id = segment.sorted ? segment.sorted[i] >> 32 : wide_in[i].key;
      const int64_t entry = segment.sorted ? segment.sorted[i] & 0xffffffffu : wide_in[i].entry;
      if (id != previous) {
        out.ids[unique] = id;
        out.starts[unique++] = kept;
        previous = id;
      }
      out.sources[kept] = source[entry];
      if (out.positions) out.positions[kept] = position[entry];
      if (out.inverse) out.inverse[position[entry]] = unique - 1;
    }
  }
};

}  // namespace

template <class Id>
int64_t unique_segments(const Id* ids, const Chunk* chunks, int64_t num_chunks,
                        int64_t num_segments, const int64_t* limits, const int64_t* bounds,
                        const int64_t* bags, const UniqueResult& result, int threads) {
  std::vector<Segment> segments(num_segments);
  int64_t total = 0;
  for (int64_t c = 0; c < num_chunks; ++c) {
    Segment& segment = segments[chunks[c].segment];
    if (segment.num_chunks++ == 0) {
      segment.first_chunk = c;
      segment.first_entry = total;
    }
    segment.entries += chunks[c].count;
    total += chunks[c].count;
  }
  bool all_narrow = total < kMaxPacked;
  for (int64_t s = 0; s < num_segments; ++s) all_narrow &= limits[s] <= kMaxPacked;
  Task<Id> task{ids, chunks, limits, bounds, bags,
                scratch<uint64_t>(0, total), scratch<uint64_t>(1, total),
                all_narrow ? nullptr : scratch<Entry>(0, total),
                scratch<int64_t>(0, total), scratch<int64_t>(1, total)};
  if (result.inverse)
    for (int64_t c = 0; c < num_chunks; ++c)
      std::fill_n(result.inverse + chunks[c].start, chunks[c].count, -1);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t s = 0; s < num_segments; ++s)
    task.sort(s, segments[s], total < kMaxPacked && limits[s] <= kMaxPacked);
  std::vector<int64_t> first_unique(num_segments + 1, 0), first_kept(num_segments + 1, 0);
  int64_t bad = std::numeric_limits<int64_t>::max();
  for (int64_t s = 0; s < num_segments; ++s) {
    first_unique[s + 1] = first_unique[s] + segments[s].uniques;
    first_kept[s + 1] = first_kept[s] + segments[s].kept;
    bad = std::min(bad, segments[s].bad);
  }
  std::copy(first_unique.begin(), first_unique.end(), result.splits);
  if (bad != std::numeric_limits<int64_t>::max()) return -(bad + 1);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t s = 0; s < num_segments; ++s)
    task.emit(segments[s], first_unique[s], first_kept[s], result);
  result.starts[first_unique[num_segments]] = first_kept[num_segments];
  return first_unique[num_segments];
}

template int64_t unique_segments<int64_t>(const int64_t*, const Chunk*, int64_t, int64_t,
                                          const int64_t*, const int64_t*, const int64_t*,
                                          const UniqueResult&, int);
template int64_t unique_segments<int32_t>(const int32_t*, const Chunk*, int64_t, int64_t,
                                          const int64_t*, const int64_t*, const int64_t*,
                                          const UniqueResult&, int);

// ---------------------------------------------------------------- routing of bags
namespace {

struct Bags {
  const int64_t *ids, *offsets;
  int64_t length, batch;
  int64_t begin(int64_t bag) const { return length >= 0 ? bag * length : offsets[bag]; }
};

// Returns the first bad position, or -1. Two passes where a table has several row blocks: count,
// then place; block boundaries are few, so a linear search would do, binary keeps it O(log).
int64_t route_table(const Bags& bags, const RouteTable& table, const int64_t* ends,
                    int64_t* out_ids, int64_t* out_positions, int64_t* out_lengths,
                    int64_t* counts) {
  const int64_t first_bag = table.first_feature * bags.batch;
  const int64_t num_bags = table.num_features * bags.batch;
  const int64_t first = bags.begin(first_bag), last = bags.begin(first_bag + num_bags);
  auto block_of = [&](int64_t id) {
    return table.num_blocks == 1 ? 0 : std::upper_bound(ends, ends + table.num_blocks, id) - ends;
  };
  std::vector<int64_t> next(table.num_blocks, 0);
  std::fill_n(counts, table.num_blocks, 0);
  for (int64_t p = first; p < last; ++p) {
    const int64_t id = check(bags.ids[p], table.rows, table.bounds);
    if (id >= 0)
      ++counts[block_of(id)];
    else if ((Bounds)table.bounds == Bounds::kError)
      return p;
  }
  int64_t at = first;
  for (int64_t k = 0; k < table.num_blocks; ++k) {
    next[k] = at;
    at += counts[k];
  }
  for (int64_t bag = 0; bag < num_bags; ++bag) {
    if (out_lengths)
      for (int64_t k = 0; k < table.num_blocks; ++k) out_lengths[k * num_bags + bag] = -next[k];
    for (int64_t p = bags.begin(first_bag + bag); p < bags.begin(first_bag + bag + 1); ++p) {
      const int64_t id = check(bags.ids[p], table.rows, table.bounds);
      if (id < 0) continue;
      const int64_t k = block_of(id), slot = next[k]++;
      out_ids[slot] = id - (k ? ends[k - 1] : 0);
      if (out_positions) out_positions[slot] = p;
    }
    if (out_lengths)
      for (int64_t k = 0; k < table.num_blocks; ++k) out_lengths[k * num_bags + bag] += next[k];
  }
  return -1;
}

}  // namespace

int64_t route_bags(const int64_t* ids, const int64_t* offsets, int64_t length, int64_t batch,
                   const RouteTable* tables, int64_t num_tables, const int64_t* block_ends,
                   int64_t* out_ids, int64_t* out_positions, int64_t* out_lengths,
                   int64_t* out_counts, int threads) {
  const Bags bags{ids, offsets, length, batch};
  std::vector<int64_t> bad(num_tables, -1), first_length(num_tables + 1, 0);
  for (int64_t t = 0; t < num_tables; ++t)
    first_length[t + 1] =
        first_length[t] + tables[t].num_blocks * tables[t].num_features * batch;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t t = 0; t < num_tables; ++t)
    bad[t] = route_table(bags, tables[t], block_ends + tables[t].first_block, out_ids,
                         out_positions, out_lengths ? out_lengths + first_length[t] : nullptr,
                         out_counts + tables[t].first_block);
  for (int64_t t = 0; t < num_tables; ++t)
    if (bad[t] >= 0) return -(bad[t] + 1);
  return 0;
}

// ---------------------------------------------------------------- small index arithmetic
void split_sorted(const int64_t* ids, const int64_t* splits, const int64_t* queries,
                  int64_t num_queries, int64_t* index) {
  for (int64_t q = 0; q < num_queries; ++q) {
    const int64_t s = queries[2 * q], row = queries[2 * q + 1];
    index[q] = std::lower_bound(ids + splits[s], ids + splits[s + 1], row) - ids;
  }
}

template <class Id>
void pack_ids(const int64_t* ids, const int64_t* pieces, int64_t num_pieces, Id* out) {
  for (int64_t k = 0; k < num_pieces; ++k) {
    const int64_t *piece = pieces + 4 * k, *from = ids + piece[0];
    Id* to = out + piece[3];
    for (int64_t i = 0; i < piece[1]; ++i) to[i] = (Id)(from[i] - piece[2]);
  }
}
template void pack_ids<int32_t>(const int64_t*, const int64_t*, int64_t, int32_t*);
template void pack_ids<int64_t>(const int64_t*, const int64_t*, int64_t, int64_t*);

namespace {
// Little-endian, as the processors that this is built for.
template <int kWidth>
void pack_piece(const int64_t* ids, int64_t count, int64_t subtract, char* out) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = ids[i] - subtract;
    std::memcpy(out + i * kWidth, &row, kWidth);
  }
}

template <int kWidth>
void unpack_piece(const char* source, int64_t count, int64_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    int64_t row = 0;
    std::memcpy(&row, source + i * kWidth, kWidth);
    out[i] = row;
  }
}

// Calls body with a width known at compile time: an id is then a move or two.
template <class Body>
void with_width(int64_t width, const Body& body) {
  switch (width) {
    case 1: return body(std::integral_constant<int, 1>{});
    case 2: return body(std::integral_constant<int, 2>{});
    case 3: return body(std::integral_constant<int, 3>{});
    case 4: return body(std::integral_constant<int, 4>{});
    case 5: return body(std::integral_constant<int, 5>{});
    case 6: return body(std::integral_constant<int, 6>{});
    case 7: return body(std::integral_constant<int, 7>{});
    default: return body(std::integral_constant<int, 8>{});
  }
}
}  // namespace

void pack_bytes(const int64_t* ids, const int64_t* pieces, int64_t num_pieces, char* out) {
  for (int64_t k = 0; k < num_pieces; ++k) {
    const int64_t* piece = pieces + 5 * k;
    with_width(piece[4], [&](auto width) {
      pack_piece<width()>(ids + piece[0], piece[1], piece[2], out + piece[3]);
    });
  }
}

void unpack_bytes(const char* source, const int64_t* pieces, int64_t num_pieces, int64_t* out) {
  for (int64_t k = 0; k < num_pieces; ++k) {
    const int64_t* piece = pieces + 4 * k;
    with_width(piece[2], [&](auto width) {
      unpack_piece<width()>(source + piece[0], piece[1], out + piece[3]);
    });
  }
}

void fill_affine(const int64_t* pieces, int64_t num_pieces, int64_t* out) {
  for (int64_t k = 0; k < num_pieces; ++k) {
    const int64_t* piece = pieces + 4 * k;
    for (int64_t i = 0; i < piece[1]; ++i) out[piece[0] + i] = piece[2] + i * piece[3];
  }
}

// ---------------------------------------------------------------- initial weights
namespace {
// splitmix64 (Steele et al. 2014): a bijection whose outputs pass BigCrush for a counter.
uint64_t splitmix(uint64_t x) {
  x += 0x9E3779B97F4A7C15ULL;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL;
  return x ^ (x >> 31);
}

// Weights counter, counter + 1, ..
void write_weights(float* row, uint64_t counter, int64_t columns, float low, float high) {
  const float width = high - low;
  for (int64_t c = 0; c < columns; ++c)  // the top 24 bits fill a float's fraction
    row[c] = low + width * ((float)(splitmix(counter + c) >> 40) * 0x1p-24f);
}
}  // namespace

void init_uniform(char* rows, int64_t row_bytes, int64_t num_rows, int64_t columns,
                  uint64_t seed, int64_t first_row, int64_t first_column, int64_t table_columns,
                  float low, float high, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < num_rows; ++i)
    write_weights((float*)(rows + i * row_bytes),
                  seed + (uint64_t)((first_row + i) * table_columns + first_column), columns, low,
                  high);
}

void init_pieces(float* values, int64_t count, int64_t columns, const int64_t* numbers,
                 const int64_t* tables, const int64_t* seeds, const float* bounds, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < count; ++i) {
    const int64_t t = tables[i];
    write_weights(values + i * columns, (uint64_t)seeds[t] + (uint64_t)(numbers[i] * columns),
                  columns, bounds[2 * t], bounds[2 * t + 1]);
  }
}

}  // namespace shardlab
