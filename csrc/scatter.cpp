// Bags of one id each: reading rows in ascending order is 1.4 to 2 times as fast as in the order of
// the bags (DRAM pages and TLB entries are used several times), and a hot row is read once.
//
// Source: own.
#include "scatter.h"

#include <omp.h>

#include <algorithm>

#include "codec.h"
#include "sums.h"
#include "vec.h"

namespace shardlab::SHARDLAB_ISA {
namespace {

constexpr int64_t kAhead = 16;  // rows, and entries, ahead to prefetch

struct Piece {
  const char* rows;
  int64_t row_bytes, columns;
  const int64_t *ids, *starts;  // of the piece's uniques
};

template <class Reader, bool kWeighted>
inline void copy_row(const char* record, float* target, int64_t columns, float weight) {
  const auto row = Reader::open(record, columns);
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) {
    const Vec value = Reader::load(row, c);
    store(target + c, kWeighted ? value * weight : value);
  }
  if (c < columns) {
    const Vec value = Reader::load_part(row, c, columns - c);
    store_part(target + c, kWeighted ? value * weight : value, columns - c);
  }
}

template <class Reader, bool kWeighted>
void scatter_piece(const Piece& piece, int64_t begin, int64_t end, const Csr& csr, float* out) {
  const int64_t bytes = payload_bytes(Reader::kCodec, piece.columns);
  const int64_t out_bytes = piece.columns * (int64_t)sizeof(float), last = piece.starts[end];
  int64_t ahead = piece.starts[begin];
  for (int64_t u = begin; u < end; ++u) {
    if (u + kAhead < end) prefetch_read(piece.rows + piece.ids[u + kAhead] * piece.row_bytes, bytes);
    const char* row = piece.rows + piece.ids[u] * piece.row_bytes;
    const int64_t from = piece.starts[u], to = piece.starts[u + 1];
    for (; ahead < std::min(to + kAhead, last); ++ahead)
      prefetch_write(out + csr.sources[ahead], out_bytes);
    for (int64_t k = from; k < to; ++k)
      copy_row<Reader, kWeighted>(row, out + csr.sources[k], piece.columns,
                                  kWeighted ? csr.weights[k] : 1.0f);
  }
}

void scatter(const Arena& arena, const int64_t* ids, const int64_t* splits, const Csr& csr,
             float* out, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const int64_t parts = omp_get_num_threads(), me = omp_get_thread_num();
    for (int64_t s = 0; s < arena.num_blocks; ++s) {
      const int64_t first = splits[s], count = splits[s + 1] - first;
      const Block& block = arena.blocks[s];
      const Piece piece{arena.bytes + block.row_offset, block.row_bytes, block.columns, ids + first,
                        csr.starts + first};
      const int64_t begin = cut(piece.starts, count, me, parts);
      const int64_t end = cut(piece.starts, count, me + 1, parts);
      with_reader(arena.encodings ? (Codec)arena.encodings[s].codec : Codec::kFp32,
                  [&](auto reader) {
                    if (csr.weights)
                      scatter_piece<decltype(reader), true>(piece, begin, end, csr, out);
                    else
                      scatter_piece<decltype(reader), false>(piece, begin, end, csr, out);
                  });
    }
  }
}

}  // namespace

extern const ScatterKernels scatter_kernels{scatter};

}  // namespace shardlab::SHARDLAB_ISA
