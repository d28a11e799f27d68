// Bags of one id each: reading rows in ascending order is 1.4 to 2 times as fast as in the order of
// the bags (DRAM pages and TLB entries are used several times), and a hot row is read once.
//
// Source: own.
#include "scatter.h"

#include <omp.h>

#include <algorithm>

#include "vec.h"

namespace shardlab::SHARDLAB_ISA {
namespace {

constexpr int64_t kAhead = 16;  // rows, and entries, ahead to prefetch

struct Piece {
  const char* rows;
  int64_t row_bytes, columns;
  const int64_t *ids, *starts;  // of the piece's uniques
};

inline void copy_row(const float* row, float* target, int64_t columns, float weight, bool weighted) {
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) {
    const Vec value = load(row + c);
    store(target + c, weighted ? value * weight : value);
  }
  if (c < columns) {
    const Vec value = load_part(row + c, columns - c);
    store_part(target + c, weighted ? value * weight : value, columns - c);
  }
}

void scatter_piece(const Piece& piece, int64_t begin, int64_t end, const Csr& csr, float* out) {
  const int64_t bytes = piece.columns * (int64_t)sizeof(float);
  const int64_t last = piece.starts[end];
  int64_t ahead = piece.starts[begin];
  for (int64_t u = begin; u < end; ++u) {
    if (u + kAhead < end) prefetch_read(piece.rows + piece.ids[u + kAhead] * piece.row_bytes, bytes);
    const float* row = (const float*)(piece.rows + piece.ids[u] * piece.row_bytes);
    const int64_t from = piece.starts[u], to = piece.starts[u + 1];
    for (; ahead < std::min(to + kAhead, last); ++ahead)
      prefetch_write(out + csr.sources[ahead], bytes);
    for (int64_t k = from; k < to; ++k)
      copy_row(row, out + csr.sources[k], piece.columns, csr.weights ? csr.weights[k] : 1.0f,
               csr.weights != nullptr);
  }
}

// First unique of `part`, so that every part gets about the same number of uniques and entries.
int64_t cut(const int64_t* starts, int64_t count, int64_t part, int64_t parts) {
  const int64_t target = (starts[count] - starts[0] + count) * part / parts;
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (starts[middle] - starts[0] + middle < target)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

void scatter(const char* arena, const Block* blocks, int64_t num_blocks, const int64_t* ids,
             const int64_t* splits, const Csr& csr, float* out, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const int64_t parts = omp_get_num_threads(), me = omp_get_thread_num();
    for (int64_t s = 0; s < num_blocks; ++s) {
      const int64_t first = splits[s], count = splits[s + 1] - first;
      const Block& block = blocks[s];
      const Piece piece{arena + block.row_offset, block.row_bytes, block.columns, ids + first,
                        csr.starts + first};
      scatter_piece(piece, cut(piece.starts, count, me, parts),
                    cut(piece.starts, count, me + 1, parts), csr, out);
    }
  }
}

}  // namespace

extern const ScatterKernels scatter_kernels{scatter};

}  // namespace shardlab::SHARDLAB_ISA
