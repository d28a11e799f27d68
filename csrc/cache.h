// The index of cache levels: which row of a shard is in which slot, and which row leaves.
#pragma once
#include <cstdint>

namespace shardlab {

// One level of one shard. Its index is `sets` records of `record_bytes` at meta + offset: `ways`
// tags and then `ways` bytes of state. See shardlab/cache_layout.py for rows, sets and tags.
struct CacheBlock {
  int64_t offset, rows, sets, ways, tag_bytes, record_bytes, policy, admission, seed;
};

enum class CachePolicy : int64_t { kLru, kLfu };
enum class CacheAdmission : int64_t { kAlways, kFrequency };

// Rows ids[start, start + count) of a block. Segments ascend by block; none has two.
struct CacheSegment {
  int64_t block, start, count;
};

struct CacheCall {
  uint8_t* meta;
  const CacheBlock* blocks;
  const CacheSegment* segments;
  int64_t num_segments;
  const int64_t* ids;
  int64_t step;
  bool touch, write;  // counts as a use; marks the slots dirty
};

enum CacheCounter { kHits, kMisses, kConflicts, kEvictions, kRefused, kStaged, kCounters };

struct CacheOutput {
  int64_t* places;     // one per id: its slot, or slots + number of its staging row
  int64_t* fills;      // [ids][3] (block, row, place), in the order of the ids
  int64_t* evictions;  // [ids][4] (block, slot, row, dirty), in the order of the ids
  int64_t* counters;   // [blocks][kCounters], added to
  int64_t* occupied;   // [blocks] slots that hold a row, kept up to date
};

struct CacheCounts {
  int64_t fills, evictions;
};

// -1; or the position of an id that is outside its block; or -2 - s where segment s has a wrong
// block or does not lie within the `num_ids` ids.
int64_t cache_check(const CacheCall& call, int64_t num_blocks, int64_t num_ids);
CacheCounts cache_place(const CacheCall& call, const CacheOutput& out, int threads);
// places of the ids, -1 where a row has no slot; nothing changes.
void cache_lookup(const CacheCall& call, int64_t* places, int threads);

}  // namespace shardlab
