// Python face of cells.cpp; addresses as in bind.cpp.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include "bind.h"
#include "cells.h"

namespace nb = nanobind;
using shardlab::Sizes;
using shardlab::binding::Address;
using shardlab::binding::at;

namespace {

// (table, counts, vectors, bytes, at)
shardlab::CellEnd end_from(const std::vector<Address>& v, const Sizes& cells_of,
                           const Sizes& samples_of) {
  if (v.size() != 5) throw nb::value_error("an end of cells needs 5 addresses");
  if (cells_of.empty() || cells_of.size() != samples_of.size())
    throw nb::value_error("every part needs a number of cells and of samples");
  return {at<int64_t>(v[0]), at<int64_t>(v[1]), cells_of,         samples_of,
          at<int64_t>(v[2]), at<int64_t>(v[3]), at<int64_t>(v[4])};
}

}  // namespace

void bind_cells(nb::module_& m) {
  m.def("place_cells", [](const std::vector<Address>& slots, const Sizes& slots_of,
                          const Sizes& samples_out, const std::vector<Address>& cells,
                          const Sizes& cells_of, const Sizes& samples_in, int64_t head,
                          bool cells_send) {
    const auto parts = shardlab::place_cells(end_from(slots, slots_of, samples_out),
                                             end_from(cells, cells_of, samples_in), head,
                                             cells_send);
    return std::pair(parts.slots, parts.cells);
  });
  m.def("route_slots", [](Address table, int64_t slots, Address starts, Address counts,
                          Address pieces, Address slot_counts, Address slot_starts) {
    return shardlab::route_slots(at<int64_t>(table), slots, at<int64_t>(starts),
                                 at<int64_t>(counts), at<int64_t>(pieces),
                                 at<int64_t>(slot_counts), at<int64_t>(slot_starts));
  });
  m.def("read_heads", [](Address heads, int64_t parts, int64_t slots, Address table,
                         Address counts, Address pieces) {
    return shardlab::read_heads({at<int32_t>(heads), parts, slots, at<int64_t>(table)},
                                at<int64_t>(counts), at<int64_t>(pieces));
  });
  m.def("select_columns", [](const std::vector<Address>& columns, Address index, int64_t count,
                             Address out) {
    std::vector<const int64_t*> from;
    for (const Address column : columns) from.push_back(at<int64_t>(column));
    shardlab::select_columns(from, at<int64_t>(index), count, at<int64_t>(out));
  });
  m.def("take_affine", [](Address pieces, int64_t num_pieces, int64_t total, Address inverse,
                          int64_t count, Address out) {
    nb::gil_scoped_release release;
    shardlab::take_affine(at<int64_t>(pieces), num_pieces, total, at<int64_t>(inverse), count,
                          at<int64_t>(out));
  });
  m.def("sum_parts", [](Address counts, Address factors, const Sizes& cells_of) {
    return shardlab::sum_parts(at<int64_t>(counts), at<int64_t>(factors), cells_of);
  });
  m.def("sum_by_key", [](Address values, Address keys, int64_t count, int64_t num_keys) {
    return shardlab::sum_by_key(at<int64_t>(values), at<int64_t>(keys), count, num_keys);
  });
}
