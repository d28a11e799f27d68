// Python face of the cache index: `shardlab/ops/cache.py` is the only caller.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "bind.h"
#include "cache.h"

namespace nb = nanobind;

namespace {

using shardlab::binding::Address;

struct Inputs {
  Address meta, blocks, segments;
  int64_t num_segments;
  Address ids;
};

shardlab::CacheCall call_from(const Inputs& in, int64_t step, bool touch, bool write) {
  return {(uint8_t*)in.meta,
          (const shardlab::CacheBlock*)in.blocks,
          (const shardlab::CacheSegment*)in.segments,
          in.num_segments,
          (const int64_t*)in.ids,
          step,
          touch,
          write};
}

}  // namespace

void bind_cache(nb::module_& m) {
  using namespace shardlab;
  // inputs: (meta, blocks, segments, number of segments, ids).
  using InputTuple = std::tuple<Address, Address, Address, int64_t, Address>;
  static const auto unpack = [](const InputTuple& t) {
    return Inputs{std::get<0>(t), std::get<1>(t), std::get<2>(t), std::get<3>(t), std::get<4>(t)};
  };
  m.def("cache_check", [](const InputTuple& inputs, int64_t num_blocks, int64_t num_ids) {
    nb::gil_scoped_release release;
    return cache_check(call_from(unpack(inputs), 0, false, false), num_blocks, num_ids);
  });
  m.def("cache_place", [](const InputTuple& inputs, int64_t step, bool touch, bool write,
                          const std::vector<Address>& out, int threads) {
    nb::gil_scoped_release release;
    const CacheOutput output{(int64_t*)out.at(0), (int64_t*)out.at(1), (int64_t*)out.at(2),
                             (int64_t*)out.at(3), (int64_t*)out.at(4)};
    const CacheCounts counts =
        cache_place(call_from(unpack(inputs), step, touch, write), output, threads);
    return std::tuple<int64_t, int64_t>{counts.fills, counts.evictions};
  });
  m.def("cache_lookup", [](const InputTuple& inputs, Address places, int threads) {
    nb::gil_scoped_release release;
    cache_lookup(call_from(unpack(inputs), 0, false, false), (int64_t*)places, threads);
  });
}
