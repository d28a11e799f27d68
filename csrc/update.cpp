// One optimiser step on every unique row: gradients summed in a fixed order, the row decoded,
// stepped in fp32, encoded and written, in one pass. Bound by random memory access.
//
// Source: the exact fused optimiser of arXiv 2104.05158; low-precision rows without an fp32 copy as
// in the stochastic rounding of arXiv 2010.11305's lineage.
#include "update.h"

#include <omp.h>

#include <algorithm>
#include <vector>

#include "update_block.h"

namespace shardlab::SHARDLAB_ISA {
namespace {

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

template <class Rule>
void step_row_with(const CoreStep& core, const Updates& one) {
  with_rows(core.arena, core.block, one, 1, [&](auto rows) {
    update_block<Rule>(rows, one, 0, 1, core.step, nullptr);  // no sum: the gradient is whole
  });
}

}  // namespace

void step_row(const CoreStep& core, int64_t row, const float* grad) {
  const int64_t starts[2] = {0, 1}, source = 0;
  const Updates one{&row, nullptr, {starts, &source, nullptr}, grad, nullptr, core.key, nullptr};
  switch (core.rule) {
    case Rule::kSgd: return step_row_with<Sgd>(core, one);
    case Rule::kAdagrad: return step_row_with<Adagrad>(core, one);
    case Rule::kRowWiseAdagrad: return step_row_with<RowWiseAdagrad>(core, one);
    case Rule::kAdam: return step_row_with<Adam>(core, one);
    case Rule::kRowWiseAdam: return step_row_with<RowWiseAdam>(core, one);
  }
}

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
