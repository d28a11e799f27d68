// Python face of the kernels. Tensors come as addresses (Tensor.data_ptr()): the wrappers in
// shardlab/ops check dtype, shape, device and contiguity once, and a DLPack capsule per tensor
// would cost more than small kernels do (about 3 us each, 10 tensors a call). No torch header.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bind.h"
#include "dispatch.h"
#include "members.h"
#include "unique.h"

namespace nb = nanobind;
using shardlab::binding::Address;
using shardlab::binding::at;

namespace {

void bind_init(nb::module_& m) {
  using namespace shardlab;
  m.def("init_uniform", [](Address rows, int64_t row_bytes, int64_t num_rows, int64_t columns,
                           uint64_t seed, int64_t first_row, int64_t first_column,
                           int64_t table_columns, float low, float high, int threads) {
    nb::gil_scoped_release release;
    init_uniform(at<char>(rows), row_bytes, num_rows, columns, seed, first_row, first_column,
                 table_columns, low, high, threads);
  });
  m.def("init_pieces", [](Address values, int64_t count, int64_t columns, Address numbers,
                          Address tables, Address seeds, Address bounds, int threads) {
    nb::gil_scoped_release release;
    init_pieces(at<float>(values), count, columns, at<int64_t>(numbers), at<int64_t>(tables),
                at<int64_t>(seeds), at<float>(bounds), threads);
  });
}

void bind_ids(nb::module_& m) {
  using namespace shardlab;
  m.def("unique_segments", [](Address ids, int64_t id_bytes, Address chunks, int64_t num_chunks,
                              int64_t num_segments, Address limits, Address bounds, Address bags,
                              const std::vector<Address>& out,
                              int threads) -> std::pair<int64_t, int64_t> {
    nb::gil_scoped_release release;
    const UniqueResult result{at<int64_t>(out.at(0)), at<int64_t>(out.at(1)),
                              at<int64_t>(out.at(2)), at<int64_t>(out.at(3)),
                              at<int64_t>(out.at(4)), at<int64_t>(out.at(5))};
    const auto run = [&](auto* typed) {
      return unique_segments(typed, at<Chunk>(chunks), num_chunks, num_segments,
                             at<int64_t>(limits), at<int64_t>(bounds), at<int64_t>(bags), result,
                             threads);
    };
    const int64_t uniques = id_bytes == 4 ? run(at<int32_t>(ids)) : run(at<int64_t>(ids));
    return {uniques, uniques < 0 ? 0 : result.starts[uniques]};
  });
  m.def("route_bags", [](Address ids, Address offsets, int64_t length, int64_t batch,
                         Address tables, int64_t num_tables, Address block_ends, Address out_ids,
                         Address out_positions, Address out_lengths, Address out_counts,
                         int threads) -> int64_t {
    nb::gil_scoped_release release;
    return route_bags(at<int64_t>(ids), at<int64_t>(offsets), length, batch,
                      at<RouteTable>(tables), num_tables, at<int64_t>(block_ends),
                      at<int64_t>(out_ids), at<int64_t>(out_positions), at<int64_t>(out_lengths),
                      at<int64_t>(out_counts), threads);
  });
  m.def("split_sorted", [](Address ids, Address splits, Address queries, int64_t num_queries,
                           Address index) {
    split_sorted(at<int64_t>(ids), at<int64_t>(splits), at<int64_t>(queries), num_queries,
                 at<int64_t>(index));
  });
  m.def("pack_ids", [](Address ids, Address pieces, int64_t num_pieces, Address out,
                       int64_t id_bytes) {
    nb::gil_scoped_release release;
    if (id_bytes == 4)
      pack_ids(at<int64_t>(ids), at<int64_t>(pieces), num_pieces, at<int32_t>(out));
    else
      pack_ids(at<int64_t>(ids), at<int64_t>(pieces), num_pieces, at<int64_t>(out));
  });
  m.def("mark_members", [](Address keys, int64_t num_keys, Address members, int64_t num_members,
                           Address found) {
    nb::gil_scoped_release release;
    mark_members(at<int64_t>(keys), num_keys, at<int64_t>(members), num_members, at<bool>(found));
  });
  m.def("pack_bytes", [](Address ids, Address pieces, int64_t num_pieces, Address out) {
    nb::gil_scoped_release release;
    pack_bytes(at<int64_t>(ids), at<int64_t>(pieces), num_pieces, at<char>(out));
  });
  m.def("unpack_bytes", [](Address source, Address pieces, int64_t num_pieces, Address out) {
    nb::gil_scoped_release release;
    unpack_bytes(at<char>(source), at<int64_t>(pieces), num_pieces, at<int64_t>(out));
  });
  m.def("fill_affine", [](Address pieces, int64_t num_pieces, Address out) {
    nb::gil_scoped_release release;
    fill_affine(at<int64_t>(pieces), num_pieces, at<int64_t>(out));
  });
}

void bind_dense(nb::module_& m) {
  using namespace shardlab;
  m.def("dot_interaction_forward", [](Address bottom, Address pooled, Address out, int64_t batch,
                                      int64_t features, int64_t columns, int threads) {
    nb::gil_scoped_release release;
    active_kernels().interaction->forward({batch, features, columns}, at<float>(bottom),
                                          at<float>(pooled), at<float>(out), threads);
  });
  m.def("dot_interaction_backward",
        [](Address grad, Address bottom, Address pooled, Address grad_bottom, Address grad_pooled,
           int64_t batch, int64_t features, int64_t columns, int threads) {
          nb::gil_scoped_release release;
          active_kernels().interaction->backward({batch, features, columns}, at<float>(grad),
                                                 at<float>(bottom), at<float>(pooled),
                                                 at<float>(grad_bottom), at<float>(grad_pooled),
                                                 threads);
        });
  m.def("linear_relu_forward", [](Address x, int64_t x_stride, Address weight, Address bias,
                                  Address out, int64_t batch, int64_t inputs, int64_t outputs,
                                  bool relu, int threads) {
    nb::gil_scoped_release release;
    active_kernels().linear->forward(
        {batch, inputs, outputs},
        {at<float>(x), x_stride, at<float>(weight), at<float>(bias), at<float>(out), relu},
        threads);
  });
  m.def("linear_relu_backward",
        [](Address grad, Address out, Address x, int64_t x_stride, Address weight, Address grad_x,
           Address grad_weight, Address grad_bias, int64_t batch, int64_t inputs, int64_t outputs,
           int threads) {
          nb::gil_scoped_release release;
          active_kernels().linear->backward(
              {batch, inputs, outputs},
              {at<float>(grad), at<float>(out), at<float>(x), x_stride, at<float>(weight),
               at<float>(grad_x), at<float>(grad_weight), at<float>(grad_bias)},
              threads);
        });
}

void bind_dense_bf16(nb::module_& m) {
  using namespace shardlab;
  m.def("has_bf16_products", [] { return has_bf16_products(); });
  m.def("linear_relu_forward_bf16",
        [](Address x, bool x_is_bf16, int64_t x_stride, Address weight, Address bias, Address out,
           int64_t batch, int64_t inputs, int64_t outputs, bool relu, int threads) {
          nb::gil_scoped_release release;
          active_kernels().linear->forward_bf16({batch, inputs, outputs},
                                                {at<void>(x), x_is_bf16, x_stride,
                                                 at<float>(weight), at<float>(bias),
                                                 at<uint16_t>(out), relu},
                                                threads);
        });
  m.def("linear_relu_backward_bf16",
        [](Address grad, Address out, Address x, bool x_is_bf16, int64_t x_stride, Address weight,
           Address grad_x, Address grad_weight, Address grad_bias, int64_t batch, int64_t inputs,
           int64_t outputs, int threads) {
          nb::gil_scoped_release release;
          active_kernels().linear->backward_bf16(
              {batch, inputs, outputs},
              {at<uint16_t>(grad), at<uint16_t>(out), at<void>(x), x_is_bf16, x_stride,
               at<float>(weight), at<void>(grad_x), at<float>(grad_weight), at<float>(grad_bias)},
              threads);
        });
}

}  // namespace

NB_MODULE(_native, m) {
  m.def("isa", [] { return std::string(shardlab::active_kernels().name); });
  m.def("processor_vendor", [] { return std::string(shardlab::processor_vendor()); });
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const auto& kernels : shardlab::available_kernels()) names.emplace_back(kernels.name);
    return names;
  });
  bind_rows(m);
  bind_init(m);
  bind_ids(m);
  bind_dense(m);
  bind_dense_bf16(m);
  bind_cache(m);
  bind_scatter(m);
  bind_tensor_train(m);
  bind_disk(m);
  bind_chunks(m);
  bind_lane(m);
  bind_cells(m);
}
