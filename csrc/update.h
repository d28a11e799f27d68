// The update kernel: it has a source of its own, and a place in the table of rows.cpp.
#pragma once
#include "rows.h"
#include "tensor_train.h"

namespace shardlab::SHARDLAB_ISA {

void update(const Arena& arena, const Updates& updates, Rule rule, const Step& step, int threads);

// One step on row `row` of a block, whose gradient is known: the same bits as `update`.
void step_row(const CoreStep& core, int64_t row, const float* grad);

}  // namespace shardlab::SHARDLAB_ISA
