// Bindings that have a file of their own; bind.cpp calls them.
#pragma once
#include <nanobind/nanobind.h>

void bind_rows(nanobind::module_& m);
void bind_cache(nanobind::module_& m);
void bind_scatter(nanobind::module_& m);
void bind_tensor_train(nanobind::module_& m);
void bind_chunks(nanobind::module_& m);
void bind_disk(nanobind::module_& m);
void bind_lane(nanobind::module_& m);
