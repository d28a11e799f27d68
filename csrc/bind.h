// What bindings share, and those that have a file of their own; bind.cpp calls them.
#pragma once
#include <nanobind/nanobind.h>

#include <cstdint>
#include <vector>

#include "rows.h"

namespace shardlab::binding {

// Tensors come as addresses (Tensor.data_ptr()); 0 is none.
using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// The numbers of `shardlab.ops.step_parameters.StepParameters`.
inline Step step_from(const std::vector<float>& v) {
  if (v.size() != 11) throw nanobind::value_error("step needs 11 numbers");
  return {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10]};
}

}  // namespace shardlab::binding

void bind_rows(nanobind::module_& m);
void bind_cache(nanobind::module_& m);
void bind_scatter(nanobind::module_& m);
void bind_tensor_train(nanobind::module_& m);
void bind_chunks(nanobind::module_& m);
void bind_disk(nanobind::module_& m);
void bind_lane(nanobind::module_& m);
void bind_cells(nanobind::module_& m);
