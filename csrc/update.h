// The update kernel: it has a source of its own, and a place in the table of rows.cpp.
#pragma once
#include "rows.h"

namespace shardlab::SHARDLAB_ISA {

void update(const Arena& arena, const Updates& updates, Rule rule, const Step& step, int threads);

}  // namespace shardlab::SHARDLAB_ISA
