// The step of some unique rows of one block: what whole tables and present chunks share.
#pragma once
#include <algorithm>

#include "rules.h"
#include "stored_rows.h"
#include "sums.h"

namespace shardlab::SHARDLAB_ISA {

// The summed, scaled, clipped gradients of up to kLanes uniques from `first` on: in `buffer`
// [kLanes, columns], or, for a single entry that nothing changes, where they already are.
template <class Weight>
inline void sum_batch(Batch& batch, int64_t first, const Csr& csr, const Weight& weight,
               const float* grads, const Step& s, float* buffer) {
  const bool plain = Weight::kUnit && s.scale == 1.0f && s.clip_value <= 0.0f;
  const int64_t last = csr.starts[first + batch.count];
  auto row = [&](int64_t k) {
    if (k + kAhead < last)
      prefetch_read(grads + csr.sources[k + kAhead], batch.columns * (int64_t)sizeof(float));
    return (const char*)(grads + csr.sources[k]);
  };
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

// Steps uniques [begin, end) of a block; buffer: fp32 [kLanes, columns].
template <class Rule, class Rows>
inline void update_block(Rows& rows, const Updates& updates, int64_t begin, int64_t end, const Step& s,
                  float* buffer) {
  const Csr& csr = updates.csr;
  const int64_t columns = rows.block.columns;
  rows.prefetch_first(begin);
  for (int64_t u = begin; u < end; u += kLanes) {
    Batch batch{std::min<int64_t>(kLanes, end - u), columns, {}, {},
                updates.row_squares ? updates.row_squares + u : nullptr, {}};
    for (int64_t i = 0, next = u + kLanes; i < kLanes && next < end; ++i, ++next)
      if (csr.starts[next] < csr.starts[next + 1])
        batch.coming[i] = updates.grads + csr.sources[csr.starts[next]];
    with_weights(csr.weights, [&](const auto& weight) {
      sum_batch(batch, u, csr, weight, updates.grads, s, buffer);
    });
    rows.open(batch, u);
    Rule::step(batch, rows, s);
    rows.close(batch);
  }
}

}  // namespace shardlab::SHARDLAB_ISA
