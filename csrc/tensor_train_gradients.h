// Gradients of cores: they have a source of their own, and a place in the table of tensor_train.cpp.
#pragma once
#include "tensor_train.h"

namespace shardlab::SHARDLAB_ISA {

void gradients(const TensorTrain& train, const TrainIndex& index, const float* products,
               const float* row_grads, bool every, float* const* core_grads, int threads);

void step(const TensorTrain& train, const TrainIndex& index, const float* products,
          const float* row_grads, bool every, const CoreStep* cores, int threads);

}  // namespace shardlab::SHARDLAB_ISA
