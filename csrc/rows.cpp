// Gather, pool, sum and update of table rows: bound by random memory access, so every loop
// prefetches the rows it will touch a few iterations ahead.
//
// Sources: own; the update is the exact fused optimiser of arXiv 2104.05158 (gradients of a row are
// summed in a fixed order, then one step).
#include "rows.h"

#include <omp.h>

#include <algorithm>
#include <vector>

#include "vec.h"

namespace shardlab::SHARDLAB_ISA {
namespace {

// Rows ahead to prefetch. 390 ns of latency at about 20 ns a row; flat between 8 and 32.
constexpr int64_t kAhead = 16;
// Bags pooled for all features before the next: their output lines stay in the second-level cache
// and their pages in the TLB.
constexpr int64_t kBagBlock = 128;
constexpr int kBlockVecs = 8;  // accumulators of a column block

// ---------------------------------------------------------------- gather
void gather_part(const char* rows, const Block& block, const int64_t* ids, int64_t begin,
                 int64_t end, float* out) {
  const int64_t columns = block.columns, bytes = columns * (int64_t)sizeof(float);
  for (int64_t i = begin; i < end; ++i) {
    if (i + kAhead < end) prefetch_read(rows + ids[i + kAhead] * block.row_bytes, bytes);
    const float* row = (const float*)(rows + ids[i] * block.row_bytes);
    float* target = out + i * columns;
    int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) store(target + c, load(row + c));
    if (c < columns) store_part(target + c, load_part(row + c, columns - c), columns - c);
  }
}

void gather(const char* arena, const Block* blocks, const GatherSegment* segments,
            int64_t num_segments, const int64_t* ids, float* out, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const int64_t parts = omp_get_num_threads(), me = omp_get_thread_num();
    for (int64_t s = 0; s < num_segments; ++s) {
      const GatherSegment& segment = segments[s];
      const Block& block = blocks[segment.block];
      gather_part(arena + block.row_offset, block, ids + segment.start, segment.count * me / parts,
                  segment.count * (me + 1) / parts, out + segment.out_start);
    }
  }
}

// ---------------------------------------------------------------- weighted sums of rows
// sum[0..columns) = sum_k w_k * row(k), k in [begin, end), in order, in blocks of columns.
template <int N, class Row, class Weight>
inline void sum_block(int64_t begin, int64_t end, int64_t column, const Row& row,
                      const Weight& weight, Vec* sum) {
  for (int v = 0; v < N; ++v) sum[v] = Vec{};
  for (int64_t k = begin; k < end; ++k) {
    const float* source = row(k);
    if (!source) continue;
    const float w = weight(k);
    for (int v = 0; v < N; ++v) sum[v] += Weight::kUnit ? load(source + column + v * kLanes)
                                                        : load(source + column + v * kLanes) * w;
  }
}

template <class Row, class Weight>
inline Vec sum_tail(int64_t begin, int64_t end, int64_t column, int64_t n, const Row& row,
                    const Weight& weight) {
  Vec sum{};
  for (int64_t k = begin; k < end; ++k) {
    const float* source = row(k);
    if (!source) continue;
    const Vec part = load_part(source + column, n);
    sum += Weight::kUnit ? part : part * weight(k);
  }
  return sum;
}

// Calls write(column, vec, lanes) for every block of columns of the sum.
template <class Row, class Weight, class Write>
inline void sum_rows(int64_t begin, int64_t end, int64_t columns, const Row& row,
                     const Weight& weight, const Write& write) {
  Vec sum[kBlockVecs];
  int64_t c = 0;
  auto emit = [&](int n) {
    for (int v = 0; v < n; ++v) write(c + v * kLanes, sum[v], kLanes);
    c += n * kLanes;
  };
  for (; c + 8 * kLanes <= columns;) {
    sum_block<8>(begin, end, c, row, weight, sum);
    emit(8);
  }
  if (c + 4 * kLanes <= columns) {
    sum_block<4>(begin, end, c, row, weight, sum);
    emit(4);
  }
  if (c + 2 * kLanes <= columns) {
    sum_block<2>(begin, end, c, row, weight, sum);
    emit(2);
  }
  if (c + kLanes <= columns) {
    sum_block<1>(begin, end, c, row, weight, sum);
    emit(1);
  }
  if (c < columns) write(c, sum_tail(begin, end, c, columns - c, row, weight), columns - c);
}

struct UnitWeight {
  static constexpr bool kUnit = true;
  float operator()(int64_t) const { return 1.0f; }
};
struct ArrayWeight {
  static constexpr bool kUnit = false;
  const float* weights;
  float operator()(int64_t k) const { return weights[k]; }
};

inline void write_lanes(float* target, Vec value, int64_t lanes) {
  if (lanes == kLanes)
    store(target, value);
  else
    store_part(target, value, lanes);
}

// ---------------------------------------------------------------- pool
template <class Weight>
void pool_bags(const float* source, const PoolJob& job, int64_t begin, int64_t end,
               const int64_t* index, const int64_t* offsets, const Weight& weight, float* out) {
  const int64_t columns = job.columns, bytes = columns * (int64_t)sizeof(float);
  auto first = [&](int64_t b) {
    return job.length >= 0 ? job.first + b * job.length : offsets[job.first_bag + b];
  };
  const int64_t last = first(end);
  const float* rows = source + job.base;
  auto row = [&](int64_t p) -> const float* {
    return index[p] < 0 ? nullptr : rows + index[p] * job.step;
  };
  int64_t ahead = first(begin);  // the next position to prefetch
  for (int64_t b = begin; b < end; ++b) {
    const int64_t from = first(b), to = first(b + 1);
    for (; ahead < std::min(to + kAhead, last); ++ahead)
      if (index[ahead] >= 0) prefetch_read(rows + index[ahead] * job.step, bytes);
    float* target = out + job.out_start + b * job.out_step;
    const float mean = job.mean && to > from ? (float)(to - from) : 1.0f;
    sum_rows(from, to, columns, row, weight, [&](int64_t c, Vec value, int64_t lanes) {
      if (mean != 1.0f) value = value / mean;
      if (job.add) value += lanes == kLanes ? load(target + c) : load_part(target + c, lanes);
      write_lanes(target + c, value, lanes);
    });
  }
}

void pool(const float* source, const PoolJob* jobs, int64_t num_jobs, const int64_t* index,
          const int64_t* offsets, const float* weights, float* out, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const int64_t parts = omp_get_num_threads(), me = omp_get_thread_num();
    int64_t longest = 0;
    for (int64_t j = 0; j < num_jobs; ++j) longest = std::max(longest, jobs[j].bags / parts + 1);
    for (int64_t block = 0; block < longest; block += kBagBlock)
      for (int64_t j = 0; j < num_jobs; ++j) {
        const PoolJob& job = jobs[j];
        const int64_t begin = job.bags * me / parts + block;
        const int64_t end = std::min(job.bags * (me + 1) / parts, begin + kBagBlock);
        if (begin >= end) continue;
        if (weights)
          pool_bags(source, job, begin, end, index, offsets, ArrayWeight{weights}, out);
        else
          pool_bags(source, job, begin, end, index, offsets, UnitWeight{}, out);
      }
  }
}

// ---------------------------------------------------------------- sums per unique id
// Uniques are cut so that every thread gets about the same number of entries and uniques.
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

template <class Weight>
void sum_piece(const float* source, const Csr& csr, const SumPiece& piece, int64_t begin,
               int64_t end, const Weight& weight, float scale, float* out) {
  const float* shifted = source + piece.shift;
  const int64_t bytes = piece.columns * (int64_t)sizeof(float);
  auto row = [&](int64_t k) { return shifted + csr.sources[k]; };
  const int64_t last = csr.starts[piece.start + end];
  int64_t ahead = csr.starts[piece.start + begin];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t from = csr.starts[piece.start + i], to = csr.starts[piece.start + i + 1];
    for (; ahead < std::min(to + kAhead, last); ++ahead)
      prefetch_read(shifted + csr.sources[ahead], bytes);
    float* target = out + piece.out_start + i * piece.out_step;
    sum_rows(from, to, piece.columns, row, weight, [&](int64_t c, Vec value, int64_t lanes) {
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
      if (csr.weights)
        sum_piece(source, csr, piece, begin, end, ArrayWeight{csr.weights}, scale, out);
      else
        sum_piece(source, csr, piece, begin, end, UnitWeight{}, scale, out);
    }
  }
}

// ---------------------------------------------------------------- optimiser rules
// Rows are stepped in batches of kLanes. A rule gets the summed gradient of each (already scaled)
// and steps payload and state once. Row-wise rules take the square roots and divisions of a batch
// at once: one row after the other they are a chain of latencies, 30 ns a row.
template <class Body>
inline void for_columns(int64_t columns, const Body& body) {
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) body(c, kLanes);
  if (c < columns) body(c, (int)(columns - c));
}
inline Vec read(const float* p, int lanes) { return lanes == kLanes ? load(p) : load_part(p, lanes); }

struct Batch {
  int64_t count, columns;
  const float* grad[kLanes];
  float *row[kLanes], *state[kLanes];
  const float* row_squares;  // of the batch, or null
};

// Mean of grad^2 of every row of the batch.
inline Vec mean_squares(const Batch& batch) {
  float mean[kLanes] = {};
  for (int64_t i = 0; i < batch.count; ++i) {
    Vec total{};
    for_columns(batch.columns, [&](int64_t c, int lanes) {
      const Vec g = read(batch.grad[i] + c, lanes);
      total += g * g;
    });
    mean[i] = reduce_add(total) / (float)batch.columns;
    if (batch.row_squares && batch.row_squares[i] >= 0) mean[i] = batch.row_squares[i];
  }
  return load(mean);
}

inline Vec gather_state(const Batch& batch, int64_t at) {
  float value[kLanes] = {};
  for (int64_t i = 0; i < batch.count; ++i) value[i] = batch.state[i][at];
  return load(value);
}

inline void scatter_state(const Batch& batch, int64_t at, Vec values) {
  float value[kLanes];
  store(value, values);
  for (int64_t i = 0; i < batch.count; ++i) batch.state[i][at] = value[i];
}

// Calls body(row, state, grad, i) for every row of the batch.
template <class Body>
inline void for_rows(const Batch& batch, const Body& body) {
  for (int64_t i = 0; i < batch.count; ++i) body(batch.row[i], batch.state[i], batch.grad[i], i);
}

struct Sgd {
  static void step(const Batch& batch, const Step& s) {
    for_rows(batch, [&](float* row, float*, const float* grad, int64_t) {
      for_columns(batch.columns, [&](int64_t c, int lanes) {
        const Vec w = read(row + c, lanes);
        write_lanes(row + c, w - (read(grad + c, lanes) + w * s.weight_decay) * s.lr, lanes);
      });
    });
  }
};

struct Adagrad {
  static void step(const Batch& batch, const Step& s) {
    for_rows(batch, [&](float* row, float* state, const float* grad, int64_t) {
      for_columns(batch.columns, [&](int64_t c, int lanes) {
        const Vec g = read(grad + c, lanes);
        const Vec h = read(state + c, lanes) + g * g;
        write_lanes(state + c, h, lanes);
        write_lanes(row + c, read(row + c, lanes) - g * s.lr / (sqrt(h) + s.eps), lanes);
      });
    });
  }
};

struct RowWiseAdagrad {
  static void step(const Batch& batch, const Step& s) {
    const Vec h = gather_state(batch, 0) + mean_squares(batch);
    scatter_state(batch, 0, h);
    float rate[kLanes];
    store(rate, s.lr / (sqrt(h) + s.eps));
    for_rows(batch, [&](float* row, float*, const float* grad, int64_t i) {
      for_columns(batch.columns, [&](int64_t c, int lanes) {
        write_lanes(row + c, read(row + c, lanes) - read(grad + c, lanes) * rate[i], lanes);
      });
    });
  }
};

struct Adam {
  static void step(const Batch& batch, const Step& s) {
    for_rows(batch, [&](float* row, float* state, const float* grad, int64_t) {
      float *first = state, *second = state + batch.columns;
      for_columns(batch.columns, [&](int64_t c, int lanes) {
        const Vec g = read(grad + c, lanes);
        const Vec m = read(first + c, lanes) * s.beta1 + g * s.rest1;
        const Vec v = read(second + c, lanes) * s.beta2 + g * g * s.rest2;
        write_lanes(first + c, m, lanes);
        write_lanes(second + c, v, lanes);
        const Vec step = (m / s.bias1) / (sqrt(v / s.bias2) + s.eps);
        write_lanes(row + c, read(row + c, lanes) - step * s.lr, lanes);
      });
    });
  }
};

struct RowWiseAdam {
  static void step(const Batch& batch, const Step& s) {
    const int64_t at = batch.columns;
    const Vec v = gather_state(batch, at) * s.beta2 + mean_squares(batch) * s.rest2;
    scatter_state(batch, at, v);
    float rate[kLanes];
    store(rate, (s.lr / s.bias1) / (sqrt(v / s.bias2) + s.eps));
    for_rows(batch, [&](float* row, float* state, const float* grad, int64_t i) {
      for_columns(batch.columns, [&](int64_t c, int lanes) {
        const Vec m = read(state + c, lanes) * s.beta1 + read(grad + c, lanes) * s.rest1;
        write_lanes(state + c, m, lanes);
        write_lanes(row + c, read(row + c, lanes) - m * rate[i], lanes);
      });
    });
  }
};

// ---------------------------------------------------------------- update
// The summed, scaled, clipped gradients of up to kLanes uniques from `first` on: in `buffer`
// [kLanes, columns], or, for a single entry that nothing changes, where they already are.
template <class Weight>
void sum_batch(Batch& batch, int64_t first, const Csr& csr, const Weight& weight,
               const float* grads, const Step& s, float* buffer) {
  const bool plain = Weight::kUnit && s.scale == 1.0f && s.clip_value <= 0.0f;
  auto row = [&](int64_t k) { return grads + csr.sources[k]; };
  for (int64_t i = 0; i < batch.count; ++i) {
    const int64_t from = csr.starts[first + i], to = csr.starts[first + i + 1];
    if (plain && to - from == 1) {
      batch.grad[i] = row(from);
      continue;
    }
    float* sum = buffer + i * batch.columns;
    batch.grad[i] = sum;
    sum_rows(from, to, batch.columns, row, weight, [&](int64_t c, Vec value, int64_t lanes) {
      value = value * s.scale;
      write_lanes(sum + c, s.clip_value > 0.0f ? clamp(value, s.clip_value) : value, lanes);
    });
  }
}

template <class Rule, class Weight>
void update_block(char* arena, const Block& block, const int64_t* ids, const Csr& csr,
                  int64_t begin, int64_t end, const Weight& weight, const float* grads,
                  const float* row_squares, const Step& s, float* buffer) {
  char *rows = arena + block.row_offset, *states = arena + block.state_offset;
  const int64_t bytes = block.columns * (int64_t)sizeof(float), last = csr.starts[end];
  auto prefetch = [&](int64_t from, int64_t to) {
    for (int64_t u = from; u < std::min(to, end); ++u) {
      prefetch_write(rows + ids[u] * block.row_bytes, block.row_bytes);
      prefetch_write(states + ids[u] * block.state_bytes, block.state_bytes);
    }
  };
  int64_t ahead = csr.starts[begin];
  prefetch(begin, begin + kLanes);
  for (int64_t u = begin; u < end; u += kLanes) {
    prefetch(u + kLanes, u + 2 * kLanes);
    Batch batch{std::min<int64_t>(kLanes, end - u), block.columns, {}, {}, {},
                row_squares ? row_squares + u : nullptr};
    const int64_t entries = csr.starts[u + batch.count];
    for (; ahead < std::min(entries + kAhead, last); ++ahead)
      prefetch_read(grads + csr.sources[ahead], bytes);
    sum_batch(batch, u, csr, weight, grads, s, buffer);
    for (int64_t i = 0; i < batch.count; ++i) {
      batch.row[i] = (float*)(rows + ids[u + i] * block.row_bytes);
      batch.state[i] = (float*)(states + ids[u + i] * block.state_bytes);
    }
    Rule::step(batch, s);
  }
}

template <class Rule>
void update_with(char* arena, const Block* blocks, int64_t num_blocks, const int64_t* ids,
                 const int64_t* splits, const Csr& csr, const float* grads,
                 const float* row_squares, const Step& s, int threads) {
  int64_t widest = 0;
  for (int64_t b = 0; b < num_blocks; ++b) widest = std::max(widest, blocks[b].columns);
#pragma omp parallel num_threads(threads)
  {
    const int64_t parts = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t uniques = splits[num_blocks];
    const int64_t begin = cut(csr.starts, uniques, me, parts);
    const int64_t end = cut(csr.starts, uniques, me + 1, parts);
    std::vector<float> buffer(kLanes * widest);
    for (int64_t b = 0; b < num_blocks; ++b) {
      const int64_t from = std::max(begin, splits[b]), to = std::min(end, splits[b + 1]);
      if (from >= to) continue;
      if (csr.weights)
        update_block<Rule>(arena, blocks[b], ids, csr, from, to, ArrayWeight{csr.weights}, grads,
                           row_squares, s, buffer.data());
      else
        update_block<Rule>(arena, blocks[b], ids, csr, from, to, UnitWeight{}, grads,
                           row_squares, s, buffer.data());
    }
  }
}

void update(char* arena, const Block* blocks, int64_t num_blocks, const int64_t* ids,
            const int64_t* splits, const Csr& csr, const float* grads, const float* row_squares,
            Rule rule, const Step& s, int threads) {
  auto* run = &update_with<Sgd>;
  switch (rule) {
    case Rule::kSgd: break;
    case Rule::kAdagrad: run = &update_with<Adagrad>; break;
    case Rule::kRowWiseAdagrad: run = &update_with<RowWiseAdagrad>; break;
    case Rule::kAdam: run = &update_with<Adam>; break;
    case Rule::kRowWiseAdam: run = &update_with<RowWiseAdam>; break;
  }
  run(arena, blocks, num_blocks, ids, splits, csr, grads, row_squares, s, threads);
}

}  // namespace

extern const RowKernels row_kernels{gather, pool, sum, update};

}  // namespace shardlab::SHARDLAB_ISA
