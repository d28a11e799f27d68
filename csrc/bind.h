// What bindings share, and those that have a file of their own; bind.cpp calls them.
#pragma once
#include <nanobind/nanobind.h>

#include <cstdint>

namespace shardlab::binding {

// Tensors come as addresses (Tensor.data_ptr()); 0 is none.
using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace shardlab::binding

void bind_rows(nanobind::module_& m);
void bind_cache(nanobind::module_& m);
void bind_scatter(nanobind::module_& m);
void bind_tensor_train(nanobind::module_& m);
void bind_chunks(nanobind::module_& m);
void bind_disk(nanobind::module_& m);
void bind_lane(nanobind::module_& m);
