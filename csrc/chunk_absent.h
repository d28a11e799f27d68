// Gradients of absent chunks that share one: summed in groups of rows, so that the sum does not depend
// on the number of threads.
#pragma once
#include <vector>

#include "chunk_slots.h"
#include "chunks.h"
#include "lanes.h"

namespace shardlab::SHARDLAB_ISA {

constexpr int64_t kGroup = 256;  // rows whose absent chunks' gradients one thread adds up

// Adds the gradient of a row's absent chunks to the sums of its group: by column, then a count of
// every chunk.
inline void add_absent(const ChunkStore& store, int64_t slot, const float* grad, int64_t width,
                       float* sums) {
  const Place* places = slot < 0 ? nullptr : places_of(value_at(store, slot));
  float* counts = sums + store.chunks * width;
  for (int64_t k = 0; k < store.chunks; ++k, grad += width, sums += width) {
    if (places && places[k] >= 0) continue;
    for_columns(width, [&](int64_t c, int lanes) SHARDLAB_INLINE {
      write_lanes(sums + c, read(sums + c, lanes) + read(grad + c, lanes), lanes);
    });
    ++counts[k];
  }
}

// Sums of the absent chunks' gradients of every kGroup uniques of a block, each by one thread: what
// is added to what does not depend on the number of threads.
class AbsentSums {
 public:
  AbsentSums(const ChunkCall& call, const Updates& updates, const ChunkGains& gains)
      : call_(call), gains_(gains), first_(call.num_blocks + 1, 0) {
    for (int64_t b = 0; b < call.num_blocks; ++b) {
      const int64_t count = updates.splits[b + 1] - updates.splits[b];
      first_[b + 1] = first_[b] + (is_shared(b) ? (count + kGroup - 1) / kGroup : 0);
    }
    sums_.resize(first_.back() * gains.absent_stride);
  }

  // The sums of a block's groups; null where absent chunks are zeros.
  float* of(int64_t b) { return is_shared(b) ? sums_.data() + first_[b] * stride() : nullptr; }

  void add_up() const {
    for (int64_t b = 0; b < call_.num_blocks; ++b)
      for (int64_t g = first_[b]; g < first_[b + 1]; ++g)
        for (int64_t i = 0; i < stride(); ++i)
          gains_.absent[b * stride() + i] += sums_[g * stride() + i];
  }

 private:
  bool is_shared(int64_t b) const { return gains_.absent && call_.blocks[b].shared >= 0; }
  int64_t stride() const { return gains_.absent_stride; }

  const ChunkCall& call_;
  const ChunkGains& gains_;
  std::vector<int64_t> first_;
  std::vector<float> sums_;
};

// Where a thread's part of a block begins or ends: between two groups.
inline int64_t group_edge(const Updates& updates, int64_t b, int64_t at) {
  const int64_t first = updates.splits[b], end = updates.splits[b + 1];
  return at >= end ? end : at <= first ? first : first + (at - first) / kGroup * kGroup;
}

}  // namespace shardlab::SHARDLAB_ISA
