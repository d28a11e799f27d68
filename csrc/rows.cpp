// Gather, pool and sum of table rows: bound by random memory access, so every loop prefetches the
// rows it will touch a few iterations ahead. Source: own.
#include "rows.h"

#include <omp.h>

#include <algorithm>

#include "sums.h"
#include "update.h"

namespace shardlab::SHARDLAB_ISA {
namespace {

// Bags pooled for all features before the next: their output lines stay in the second-level cache
// and their pages in the TLB.
constexpr int64_t kBagBlock = 128;

// ---------------------------------------------------------------- gather
template <class Reader>
void gather_part(const char* rows, const Block& block, const int64_t* ids, int64_t begin,
                 int64_t end, float* out) {
  const int64_t columns = block.columns, bytes = payload_bytes(Reader::kCodec, columns);
  for (int64_t i = begin; i < end; ++i) {
    if (i + kAhead < end) prefetch_read(rows + ids[i + kAhead] * block.row_bytes, bytes);
    const auto row = Reader::open(rows + ids[i] * block.row_bytes, columns);
    float* target = out + i * columns;
    int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) store(target + c, Reader::load(row, c));
    if (c < columns) store_part(target + c, Reader::load_part(row, c, columns - c), columns - c);
  }
}

void gather(const Arena& arena, const GatherSegment* segments, int64_t num_segments,
            const int64_t* ids, float* out, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const int64_t parts = omp_get_num_threads(), me = omp_get_thread_num();
    for (int64_t s = 0; s < num_segments; ++s) {
      const GatherSegment& segment = segments[s];
      const Block& block = arena.blocks[segment.block];
      const Codec codec =
          arena.encodings ? (Codec)arena.encodings[segment.block].codec : Codec::kFp32;
      with_reader(codec, [&](auto reader) {
        gather_part<decltype(reader)>(arena.bytes + block.row_offset, block, ids + segment.start,
                                      segment.count * me / parts,
                                      segment.count * (me + 1) / parts, out + segment.out_start);
      });
    }
  }
}

// ---------------------------------------------------------------- pool
// Row of position p: rows + index[p] * step bytes.
template <class Reader, class Weight>
void pool_bags(const char* rows, int64_t step, const PoolJob& job, int64_t begin, int64_t end,
               const int64_t* index, const int64_t* offsets, const Weight& weight, float* out) {
  const int64_t columns = job.columns, bytes = payload_bytes(Reader::kCodec, columns);
  auto first = [&](int64_t b) {
    return job.length >= 0 ? job.first + b * job.length : offsets[job.first_bag + b];
  };
  const int64_t last = first(end);
  auto row = [&](int64_t p) -> const char* {
    return index[p] < 0 ? nullptr : rows + index[p] * step;
  };
  int64_t ahead = first(begin);  // the next position to prefetch
  for (int64_t b = begin; b < end; ++b) {
    const int64_t from = first(b), to = first(b + 1);
    for (; ahead < std::min(to + kAhead, last); ++ahead)
      if (index[ahead] >= 0) prefetch_read(rows + index[ahead] * step, bytes);
    float* target = out + job.out_start + b * job.out_step;
    const float mean = job.mean && to > from ? (float)(to - from) : 1.0f;
    sum_rows<Reader>(from, to, columns, row, weight, [&](int64_t c, Vec value, int64_t lanes) {
      if (mean != 1.0f) value = value / mean;
      if (job.add) value += lanes == kLanes ? load(target + c) : load_part(target + c, lanes);
      write_lanes(target + c, value, lanes);
    });
  }
}

// Calls run(number, begin, end) for blocks of bags of job_at(number).
template <class JobAt, class Run>
void for_bags(int64_t num_jobs, const JobAt& job_at, int threads, const Run& run) {
#pragma omp parallel num_threads(threads)
  {
    const int64_t parts = omp_get_num_threads(), me = omp_get_thread_num();
    int64_t longest = 0;
    for (int64_t j = 0; j < num_jobs; ++j) longest = std::max(longest, job_at(j).bags / parts + 1);
    for (int64_t block = 0; block < longest; block += kBagBlock)
      for (int64_t j = 0; j < num_jobs; ++j) {
        const PoolJob& job = job_at(j);
        const int64_t begin = job.bags * me / parts + block;
        const int64_t end = std::min(job.bags * (me + 1) / parts, begin + kBagBlock);
        if (begin < end) run(j, begin, end);
      }
  }
}

void pool(const float* source, const PoolJob* jobs, int64_t num_jobs, const int64_t* index,
          const int64_t* offsets, const float* weights, float* out, int threads) {
  auto job_at = [&](int64_t j) -> const PoolJob& { return jobs[j]; };
  for_bags(num_jobs, job_at, threads, [&](int64_t j, int64_t begin, int64_t end) {
    const char* rows = (const char*)(source + jobs[j].base);
    const int64_t step = jobs[j].step * (int64_t)sizeof(float);
    with_weights(weights, [&](const auto& weight) {
      pool_bags<Fp32Reader>(rows, step, jobs[j], begin, end, index, offsets, weight, out);
    });
  });
}

void pool_encoded(const char* source, const EncodedPoolJob* jobs, int64_t num_jobs,
                  const int64_t* index, const int64_t* offsets, const float* weights, float* out,
                  int threads) {
  auto job_at = [&](int64_t j) -> const PoolJob& { return jobs[j].job; };
  for_bags(num_jobs, job_at, threads, [&](int64_t j, int64_t begin, int64_t end) {
    const PoolJob& job = jobs[j].job;
    with_reader((Codec)jobs[j].codec, [&](auto reader) {
      with_weights(weights, [&](const auto& weight) {
        pool_bags<decltype(reader)>(source + job.base, job.step, job, begin, end, index, offsets,
                                    weight, out);
      });
    });
  });
}

// ---------------------------------------------------------------- sums per unique id
template <class Weight>
void sum_piece(const float* source, const Csr& csr, const SumPiece& piece, int64_t begin,
               int64_t end, const Weight& weight, float scale, float* out) {
  const float* shifted = source + piece.shift;
  const int64_t bytes = piece.columns * (int64_t)sizeof(float);
  auto row = [&](int64_t k) { return (const char*)(shifted + csr.sources[k]); };
  const int64_t last = csr.starts[piece.start + end];
  int64_t ahead = csr.starts[piece.start + begin];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t from = csr.starts[piece.start + i], to = csr.starts[piece.start + i + 1];
    for (; ahead < std::min(to + kAhead, last); ++ahead)
      prefetch_read(shifted + csr.sources[ahead], bytes);
    float* target = out + piece.out_start + i * piece.out_step;
    sum_rows<Fp32Reader>(from, to, piece.columns, row, weight,
                         [&](int64_t c, Vec value, int64_t lanes) {
                           write_lanes(target + c, scale == 1.0f ? value : value * scale, lanes);
                         });
  }
}

void sum(const float* source, const Csr& csr, const SumPiece* pieces, int64_t num_pieces,
         float scale, float* out, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const int64_t parts = omp_get_num_threads(), me = omp_get_thread_num();
    for (int64_t p = 0; p < num_pieces; ++p) {
      const SumPiece& piece = pieces[p];
      const int64_t begin = cut(csr.starts + piece.start, piece.count, me, parts);
      const int64_t end = cut(csr.starts + piece.start, piece.count, me + 1, parts);
      with_weights(csr.weights, [&](const auto& weight) {
        sum_piece(source, csr, piece, begin, end, weight, scale, out);
      });
    }
  }
}

}  // namespace

extern const RowKernels row_kernels{gather, pool, pool_encoded, sum, update};

}  // namespace shardlab::SHARDLAB_ISA
