// Python face of lanes: `shardlab/comm/shared_memory.py` is the only caller.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bind.h"
#include "lane.h"

namespace nb = nanobind;

void bind_lane(nb::module_& m) {
  using shardlab::Lane;
  using shardlab::binding::Address;
  using Sizes = std::vector<int64_t>;
  nb::class_<Lane>(m, "Lane")
      .def(nb::init<const std::vector<int>&, int, int64_t>())
      .def_static("segment_bytes", &Lane::segment_bytes)
      .def("start",
           [](Lane& lane, Address source, const Sizes& source_bytes, Address out,
              const Sizes& out_bytes, bool same) {
             const nb::gil_scoped_release release;
             return lane.start((char*)source, source_bytes, (char*)out, out_bytes, same);
           })
      .def("wait", &Lane::wait, nb::call_guard<nb::gil_scoped_release>())
      .def("awaited", &Lane::awaited)
      .def("mismatch", &Lane::mismatch);
}
