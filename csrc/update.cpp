// One optimiser step on every unique row: gradients summed in a fixed order, the row decoded,
// stepped in fp32, encoded and written, in one pass. Bound by random memory access.
//
// Source: the exact fused optimiser of arXiv 2104.05158; low-precision rows without an fp32 copy as
// in the stochastic rounding of arXiv 2010.11305's lineage.
#include "update.h"

#include <omp.h>

#include <algorithm>
#include <vector>

#include "rules.h"
#include "stored_rows.h"
#include "sums.h"

namespace shardlab::SHARDLAB_ISA {
namespace {

// The summed, scaled, clipped gradients of up to kLanes uniques from `first` on: in `buffer`
// [kLanes, columns], or, for a single entry that nothing changes, where they already are.
template <class Weight>
void sum_batch(Batch& batch, int64_t first, const Csr& csr, const Weight& weight,
               const float* grads, const Step& s, float* buffer) {
  const bool plain = Weight::kUnit && s.scale == 1.0f && s.clip_value <= 0.0f;
  auto row = [&](int64_t k) { return (const char*)(grads + csr.sources[k]); };
  for (int64_t i = 0; i < batch.count; ++i) {
    const int64_t from = csr.starts[first + i], to = csr.starts[first + i + 1];
    if (plain && to - from == 1) {
      batch.grad[i] = grads + csr.sources[from];
      continue;
    }
    float* sum = buffer + i * batch.columns;
    batch.grad[i] = sum;
    sum_rows<Fp32Reader>(from, to, batch.columns, row, weight,
                         [&](int64_t c, Vec value, int64_t lanes) {
                           value = value * s.scale;
                           write_lanes(sum + c,
                                       s.clip_value > 0.0f ? clamp(value, s.clip_value) : value,
                                       lanes);
                         });
  }
}

// ---------------------------------------------------------------- update
template <class Rule, class Rows>
void update_block(Rows& rows, const Updates& updates, int64_t begin, int64_t end, const Step& s,
                  float* buffer) {
  const Csr& csr = updates.csr;
  const int64_t columns = rows.block.columns, bytes = columns * (int64_t)sizeof(float);
  const int64_t last = csr.starts[end];
  int64_t ahead = csr.starts[begin];
  rows.prefetch_first(begin);
  for (int64_t u = begin; u < end; u += kLanes) {
    Batch batch{std::min<int64_t>(kLanes, end - u), columns, {}, {},
                updates.row_squares ? updates.row_squares + u : nullptr};
    const int64_t entries = csr.starts[u + batch.count];
    for (; ahead < std::min(entries + kAhead, last); ++ahead)
      prefetch_read(updates.grads + csr.sources[ahead], bytes);
    with_weights(csr.weights, [&](const auto& weight) {
      sum_batch(batch, u, csr, weight, updates.grads, s, buffer);
    });
    rows.open(batch, u);
    Rule::step(batch, rows, s);
    rows.close(batch);
  }
}

template <class Rule>
void update_with(const Arena& arena, const Updates& updates, const Step& s, int threads) {
  int64_t widest = 0;
  for (int64_t b = 0; b < arena.num_blocks; ++b)
    widest = std::max(widest, arena.blocks[b].columns);
#pragma omp parallel num_threads(threads)
  {
    const int64_t parts = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t uniques = updates.splits[arena.num_blocks];
    const int64_t begin = cut(updates.csr.starts, uniques, me, parts);
    const int64_t end = cut(updates.csr.starts, uniques, me + 1, parts);
    std::vector<float> buffer(kLanes * widest);
    for (int64_t b = 0; b < arena.num_blocks; ++b) {
      const int64_t from = std::max(begin, updates.splits[b]);
      const int64_t to = std::min(end, updates.splits[b + 1]);
      if (from >= to) continue;
      with_rows(arena, b, updates, to, [&](auto rows) {
        update_block<Rule>(rows, updates, from, to, s, buffer.data());
      });
    }
  }
}

}  // namespace

void update(const Arena& arena, const Updates& updates, Rule rule, const Step& s, int threads) {
  switch (rule) {
    case Rule::kSgd: return update_with<Sgd>(arena, updates, s, threads);
    case Rule::kAdagrad: return update_with<Adagrad>(arena, updates, s, threads);
    case Rule::kRowWiseAdagrad: return update_with<RowWiseAdagrad>(arena, updates, s, threads);
    case Rule::kAdam: return update_with<Adam>(arena, updates, s, threads);
    case Rule::kRowWiseAdam: return update_with<RowWiseAdam>(arena, updates, s, threads);
  }
}

}  // namespace shardlab::SHARDLAB_ISA
