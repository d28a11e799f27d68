// Rows of present and absent chunks, read as whole rows.
#include "chunk_reads.h"

#include <omp.h>

#include <algorithm>

#include "chunk_lookup.h"
#include "codec.h"
#include "sums.h"

namespace shardlab::SHARDLAB_ISA {
namespace {

constexpr int64_t kEntriesAhead = 16;  // whose places in the output are fetched

// shared: place of what chunk 0 reads as where it is absent, -1 for zeros.
template <class Reader, bool kWeighted>
SHARDLAB_INLINE inline void write_row(const ChunkStore& store, int64_t width, const char* payloads,
                                      const Place* places, int64_t shared, float weight,
                                      float* target) {
  for (int64_t k = 0; k < store.chunks; ++k, target += width) {
    int64_t place = places ? places[k] : -1;
    if (place < 0 && shared >= 0) place = shared + k;
    if (place < 0) {
      for_columns(width, [&](int64_t c, int lanes) SHARDLAB_INLINE {
        write_lanes(target + c, Vec{}, lanes);
      });
      continue;
    }
    const auto row = Reader::open(payloads + place * store.payload_bytes, width);
    for_columns(width, [&](int64_t c, int lanes) SHARDLAB_INLINE {
      const Vec value = lanes == kLanes ? Reader::load(row, c) : Reader::load_part(row, c, lanes);
      write_lanes(target + c, kWeighted ? value * weight : value, lanes);
    });
  }
}

// out: without entries, where the first row of the segment goes.
template <class Reader, bool kWeighted>
void read_rows(const ChunkCall& call, const Arena& arena, const ChunkSegment& read, int64_t begin,
               int64_t end, const int64_t* ids, const Csr* entries, int64_t* slots, float* out) {
  const ChunkStore& store = call.stores[call.blocks[read.block].store];
  const Block& block = arena.blocks[read.block];
  const char* payloads = arena.bytes + block.row_offset;
  const int64_t width = block.columns, columns = width * store.chunks;
  const int64_t shared = call.blocks[read.block].shared;
  const auto fetch = [&](int64_t, int64_t slot) SHARDLAB_INLINE {
    for_present(store, slot, [&](int64_t place) SHARDLAB_INLINE {
      prefetch_read(payloads + place * store.payload_bytes, store.payload_bytes);
    });
  };
  Lookup lookup(call, read.block, ids, end);
  lookup.begin(begin, fetch);
  const int64_t last = entries ? entries->starts[end] : 0;
  int64_t ahead = entries ? entries->starts[begin] : 0;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t slot = lookup.next(i, fetch);
    if (slots) slots[i] = slot;
    const Place* places = slot < 0 ? nullptr : places_of(value_at(store, slot));
    if (!entries) {
      write_row<Reader, false>(store, width, payloads, places, shared, 1.0f,
                               out + (i - read.start) * columns);
      continue;
    }
    const int64_t from = entries->starts[i], to = entries->starts[i + 1];
    for (; ahead < std::min(to + kEntriesAhead, last); ++ahead)
      prefetch_write(out + entries->sources[ahead], columns * (int64_t)sizeof(float));
    for (int64_t e = from; e < to; ++e)
      write_row<Reader, kWeighted>(store, width, payloads, places, shared,
                                   kWeighted ? entries->weights[e] : 1.0f,
                                   out + entries->sources[e]);
  }
}

}  // namespace

void read_chunks(const ChunkCall& call, const Arena& arena, const ChunkReads& reads,
                 const int64_t* ids, const Csr* entries, int64_t* slots, float* out, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const int64_t parts = omp_get_num_threads(), me = omp_get_thread_num();
    for (int64_t r = 0; r < reads.count; ++r) {
      const ChunkSegment one = reads.segment(r);
      int64_t begin = one.count * me / parts, end = one.count * (me + 1) / parts;
      if (entries) {
        begin = cut(entries->starts + one.start, one.count, me, parts);
        end = cut(entries->starts + one.start, one.count, me + 1, parts);
      }
      if (begin >= end) continue;
      with_reader((Codec)arena.encodings[one.block].codec, [&](auto reader) {
        const auto run = entries && entries->weights ? read_rows<decltype(reader), true>
                                                     : read_rows<decltype(reader), false>;
        run(call, arena, one, one.start + begin, one.start + end, ids, entries, slots,
            out + reads.out_start(r));
      });
    }
  }
}

}  // namespace shardlab::SHARDLAB_ISA
