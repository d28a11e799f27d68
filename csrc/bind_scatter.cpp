// Python face of scatter.cpp; addresses as in bind.cpp.
#include <nanobind/nanobind.h>

#include "bind.h"
#include "dispatch.h"

namespace nb = nanobind;
using shardlab::binding::Address;
using shardlab::binding::at;

void bind_scatter(nb::module_& m) {
  using namespace shardlab;
  m.def("scatter", [](Address arena, Address blocks, Address encodings, int64_t num_blocks,
                      Address ids, Address splits, Address starts, Address sources,
                      Address weights, Address out, int threads) {
    nb::gil_scoped_release release;
    const Csr csr{at<int64_t>(starts), at<int64_t>(sources), at<float>(weights)};
    active_kernels().scatter->scatter(
        {at<char>(arena), at<Block>(blocks), at<Encoding>(encodings), num_blocks},
        at<int64_t>(ids), at<int64_t>(splits), csr, at<float>(out), threads);
  });
}
