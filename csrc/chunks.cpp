// Steps of rows of present and absent chunks, chunk by chunk.
//
// Source: arXiv 2401.04408 (chunks, utility = accesses x norm of the gradient); the step is that of
// whole rows (update_block.h), so that a table with every chunk present trains bit for bit like one
// that is not pruned.
#include "chunks.h"

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "chunk_absent.h"
#include "chunk_lookup.h"
#include "chunk_reads.h"
#include "update_block.h"

namespace shardlab::SHARDLAB_ISA {
namespace {

constexpr int64_t kTile = 16;       // rows whose chunks are stepped together
constexpr float kMostNorm = 1e30f;  // keeps a utility finite

// The present chunks of a tile as rows of a pool, with their gradients.
struct Present {
  explicit Present(int64_t most)
      : places(most), sources(most), rows(most), starts(most + 1), squares(most) {
    for (int64_t i = 0; i <= most; ++i) starts[i] = i;
  }

  void add(const ChunkBlock& block, int64_t row, int64_t chunk, int64_t place, int64_t source,
           float mean) {
    places[count] = place;
    sources[count] = source;
    rows[count] = (block.row_start + row) * block.table_chunks + block.first_chunk + chunk;
    squares[count++] = mean;
  }

  std::vector<int64_t> places, sources, rows, starts;
  std::vector<float> squares;
  int64_t count = 0;
};

// Sums of squares of every chunk, and the mean of the row's, in the order that rules.h takes.
inline float chunk_squares(const float* grad, int64_t chunks, int64_t width, float* squares) {
  Vec total{};
  if (width == kLanes) {  // a chunk is a register: one pass
    for (int64_t k = 0; k < chunks; ++k) {
      const Vec g = load(grad + k * kLanes), square = g * g;
      total += square;
      squares[k] = reduce_add(square);
    }
    return reduce_add(total) / (float)(chunks * width);
  }
  for_columns(chunks * width, [&](int64_t c, int lanes) SHARDLAB_INLINE {
    const Vec g = read(grad + c, lanes);
    total += g * g;
  });
  if (chunks == 1) {
    squares[0] = reduce_add(total);
    return squares[0] / (float)width;
  }
  for (int64_t k = 0; k < chunks; ++k) {
    Vec part{};
    for_columns(width, [&](int64_t c, int lanes) SHARDLAB_INLINE {
      const Vec g = read(grad + k * width + c, lanes);
      part += g * g;
    });
    squares[k] = reduce_add(part);
  }
  return reduce_add(total) / (float)(chunks * width);
}

// Utilities of a row's present chunks, norms of its absent ones times `absent` (0: they do not
// count); lists the present ones.
inline void weigh_row(const ChunkStore& store, const ChunkBlock& block, float weight, float absent,
                      const ChunkGains& gains, const Updates& updates, int64_t u, int64_t slot,
                      const float* squares, int64_t source, int64_t width, float mean,
                      Present& present) {
  const float accesses = (float)(updates.csr.starts[u + 1] - updates.csr.starts[u]);
  const int64_t row = updates.ids[u];
  char* value = slot < 0 ? nullptr : value_at(store, slot);
  for (int64_t k = 0; k < store.chunks; ++k) {
    const float norm = std::min(std::sqrt(squares[k]) * accesses, kMostNorm);
    float& out = gains.norms[u * gains.stride + k];
    if (!value || places_of(value)[k] < 0) {
      out = norm * absent;
      continue;
    }
    out = -1.0f;
    uint16_t& utility = utilities_of(store, value)[k];
    if (norm > 0)
      utility = utility_code(utility_of(utility) + norm * weight,
                             chunk_word(block, gains.key, row, k));
    utility |= kMarked;
    present.add(block, row, k, places_of(value)[k], source + k * width, mean);
  }
}

// Summed and scaled gradients of whole rows, for as many as a tile has; clipped as well, or by a
// call of `clip`.
class Gradients {
 public:
  Gradients(const Updates& updates, int64_t columns, const Step& s, bool clips = true)
      : updates_(updates),
        columns_(columns),
        scale_(s.scale),
        clip_(clips ? s.clip_value : 0.0f),
        plain_(s.scale == 1.0f && s.clip_value <= 0.0f && !updates.csr.weights),
        sums_(kTile * columns) {}

  SHARDLAB_INLINE void prefetch(int64_t u) const {
    const Csr& csr = updates_.csr;
    for (int64_t e = csr.starts[u]; e < csr.starts[u + 1]; ++e)
      prefetch_read(updates_.grads + csr.sources[e], columns_ * (int64_t)sizeof(float));
  }

  // Of unique u, row i of the tile; where it lies already, if nothing changes it.
  const float* sum(int64_t u, int64_t i) {
    const Csr& csr = updates_.csr;
    const int64_t from = csr.starts[u], to = csr.starts[u + 1];
    if (plain_ && to - from == 1) return updates_.grads + csr.sources[from];
    float* sum = sums_.data() + i * columns_;
    with_weights(csr.weights, [&](const auto& weight) {
      auto row = [&](int64_t k) { return (const char*)(updates_.grads + csr.sources[k]); };
      sum_rows<Fp32Reader>(from, to, columns_, row, weight,
                           [&](int64_t c, Vec value, int64_t lanes) {
                             value = value * scale_;
                             write_lanes(sum + c, clip_ > 0.0f ? clamp(value, clip_) : value,
                                         lanes);
                           });
    });
    return sum;
  }

  // Clips row i of the tile, which was summed without.
  void clip(int64_t i, float bound) {
    float* sum = sums_.data() + i * columns_;
    for_columns(columns_, [&](int64_t c, int lanes) SHARDLAB_INLINE {
      write_lanes(sum + c, clamp(read(sum + c, lanes), bound), lanes);
    });
  }

 private:
  const Updates& updates_;
  int64_t columns_;
  float scale_, clip_;
  bool plain_;
  std::vector<float> sums_;
};

// Steps the chunks of a tile; their gradients are summed already.
template <class Rule>
void step_present(const Arena& arena, int64_t b, const Updates& updates, const Present& present,
                  const Step& s, float* buffer) {
  Step rest = s;
  rest.scale = 1.0f;
  rest.clip_value = 0.0f;
  const Updates some{present.places.data(), nullptr,
                     {present.starts.data(), present.sources.data(), nullptr}, updates.grads,
                     present.squares.data(), updates.key, present.rows.data()};
  with_rows(arena, b, some, present.count, [&](auto rows) {
    update_block<Rule>(rows, some, 0, present.count, rest, buffer);
  });
}

template <class Rule>
void update_rows(const ChunkCall& call, const Arena& arena, int64_t b, const Updates& updates,
                 int64_t begin, int64_t end, const Step& s, const ChunkGains& gains,
                 float* groups) {
  const ChunkStore& store = call.stores[call.blocks[b].store];
  const Block& block = arena.blocks[b];
  const int64_t width = block.columns;
  std::vector<float> buffer(kLanes * width), squares(store.chunks);
  Gradients grads(updates, width * store.chunks, s, !groups);
  Present present(kTile * store.chunks);
  const float share = gains.shares[b], gain = 1.0f / share;
  const auto counts = [&](int64_t u) SHARDLAB_INLINE {
    return row_counts(call.blocks[b], gains.key, updates.ids[u], share);
  };
  // Gradients of rows without a chunk that do not count are not looked at.
  const auto passes = [&](int64_t u, int64_t slot) SHARDLAB_INLINE {
    return slot < 0 && !groups && !counts(u);
  };
  const auto fetch = [&](int64_t u, int64_t slot) SHARDLAB_INLINE {
    if (passes(u, slot)) return;
    grads.prefetch(u);
    for_present(store, slot, [&](int64_t place) SHARDLAB_INLINE {
      prefetch_write(arena.bytes + block.row_offset + place * block.row_bytes, block.row_bytes);
      prefetch_write(arena.bytes + block.state_offset + place * block.state_bytes,
                     block.state_bytes);
    });
  };
  Lookup lookup(call, b, updates.ids, end, gains.slots);
  lookup.begin(begin, fetch);
  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t n = std::min(kTile, end - first);
    present.count = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t u = first + i;
      const int64_t slot = lookup.next(u, fetch);
      if (passes(u, slot)) {
        std::fill_n(gains.norms + u * gains.stride, store.chunks, 0.0f);
        continue;
      }
      const float* grad = grads.sum(u, i);
      if (groups) {
        add_absent(store, slot, grad, width,
                   groups + (u - updates.splits[b]) / kGroup * gains.absent_stride);
        if (s.clip_value > 0.0f) grads.clip(i, s.clip_value);
      }
      float mean = chunk_squares(grad, store.chunks, width, squares.data());
      if (updates.row_squares && updates.row_squares[u] >= 0) mean = updates.row_squares[u];
      weigh_row(store, call.blocks[b], gains.weights[b], counts(u) ? gain : 0.0f, gains, updates, u,
                slot, squares.data(), grad - updates.grads, width, mean, present);
    }
    step_present<Rule>(arena, b, updates, present, s, buffer.data());
  }
}

template <class Rule>
void admit_rows(const ChunkCall& call, const Arena& arena, int64_t b, const Updates& updates,
                const AdmittedChunk* one, const AdmittedChunk* end, bool written, const Step& s) {
  const ChunkStore& store = call.stores[call.blocks[b].store];
  const ChunkBlock& place = call.blocks[b];
  const Block& block = arena.blocks[b];
  const int64_t width = block.columns;
  std::vector<float> buffer(kLanes * width), squares(store.chunks);
  Gradients grads(updates, width * store.chunks, s);
  Present present(kTile * store.chunks);
  while (one < end) {
    present.count = 0;
    const AdmittedChunk* ahead = one;
    for (int64_t i = 0; i < kTile && ahead < end; ++ahead) {
      prefetch_write(arena.bytes + block.row_offset + ahead->place * block.row_bytes,
                     block.row_bytes);
      prefetch_write(arena.bytes + block.state_offset + ahead->place * block.state_bytes,
                     block.state_bytes);
      if (ahead > one && ahead->unique == ahead[-1].unique) continue;
      grads.prefetch(ahead->unique);
      ++i;
    }
    for (int64_t i = 0; i < kTile && one < end; ++i) {
      const int64_t u = one->unique;
      const float* grad = grads.sum(u, i);
      float mean = chunk_squares(grad, store.chunks, width, squares.data());
      if (updates.row_squares && updates.row_squares[u] >= 0) mean = updates.row_squares[u];
      for (; one < end && one->unique == u; ++one) {
        if (!written)
          std::memset(arena.bytes + block.row_offset + one->place * block.row_bytes, 0,
                      block.row_bytes);
        std::memset(arena.bytes + block.state_offset + one->place * block.state_bytes, 0,
                    block.state_bytes);
        present.add(place, updates.ids[u], one->chunk, one->place,
                    grad - updates.grads + one->chunk * width, mean);
      }
    }
    step_present<Rule>(arena, b, updates, present, s, buffer.data());
  }
}

template <class Rule>
void update_with(const ChunkCall& call, const Arena& arena, const Updates& updates, const Step& s,
                 const ChunkGains& gains, int threads) {
  AbsentSums absent(call, updates, gains);
#pragma omp parallel num_threads(threads)
  {
    const int64_t parts = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t uniques = updates.splits[arena.num_blocks] - updates.splits[0];
    const int64_t begin = updates.splits[0] + cut(updates.csr.starts, uniques, me, parts);
    const int64_t end = updates.splits[0] + cut(updates.csr.starts, uniques, me + 1, parts);
    for (int64_t b = 0; b < arena.num_blocks; ++b) {
      const int64_t from = group_edge(updates, b, begin), to = group_edge(updates, b, end);
      if (from < to) update_rows<Rule>(call, arena, b, updates, from, to, s, gains, absent.of(b));
    }
  }
  absent.add_up();
}

template <class Rule>
void admit_with(const ChunkCall& call, const Arena& arena, const Updates& updates, const Step& s,
                const Admissions& admitted, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const int64_t parts = omp_get_num_threads(), me = omp_get_thread_num();
    // Chunks of a row are stepped by one thread, which sums its gradient once.
    const auto edge = [&](int64_t part) {
      int64_t at = admitted.count * part / parts;
      while (at > 0 && at < admitted.count &&
             admitted.chunks[at].unique == admitted.chunks[at - 1].unique)
        ++at;
      return at;
    };
    const AdmittedChunk *one = admitted.chunks + edge(me), *end = admitted.chunks + edge(me + 1);
    for (int64_t b = 0; b < arena.num_blocks && one < end; ++b) {
      const AdmittedChunk* stop = std::partition_point(
          one, end, [&](const AdmittedChunk& a) { return a.unique < updates.splits[b + 1]; });
      if (one < stop)
        admit_rows<Rule>(call, arena, b, updates, one, stop,
                         admitted.written && admitted.written[b], s);
      one = stop;
    }
  }
}

void update_all(const ChunkCall& call, const Arena& arena, const Updates& updates, Rule rule,
                const Step& s, const ChunkGains& gains, int threads) {
  switch (rule) {
    case Rule::kSgd: return update_with<Sgd>(call, arena, updates, s, gains, threads);
    case Rule::kAdagrad: return update_with<Adagrad>(call, arena, updates, s, gains, threads);
    case Rule::kRowWiseAdagrad:
      return update_with<RowWiseAdagrad>(call, arena, updates, s, gains, threads);
    case Rule::kAdam: return update_with<Adam>(call, arena, updates, s, gains, threads);
    case Rule::kRowWiseAdam:
      return update_with<RowWiseAdam>(call, arena, updates, s, gains, threads);
  }
}

void admit_all(const ChunkCall& call, const Arena& arena, const Updates& updates, Rule rule,
               const Step& s, const Admissions& admitted, int threads) {
  switch (rule) {
    case Rule::kSgd: return admit_with<Sgd>(call, arena, updates, s, admitted, threads);
    case Rule::kAdagrad: return admit_with<Adagrad>(call, arena, updates, s, admitted, threads);
    case Rule::kRowWiseAdagrad:
      return admit_with<RowWiseAdagrad>(call, arena, updates, s, admitted, threads);
    case Rule::kAdam: return admit_with<Adam>(call, arena, updates, s, admitted, threads);
    case Rule::kRowWiseAdam:
      return admit_with<RowWiseAdam>(call, arena, updates, s, admitted, threads);
  }
}

}  // namespace

extern const ChunkKernels chunk_kernels{read_chunks, update_all, admit_all};

}  // namespace shardlab::SHARDLAB_ISA
