// Python face of tensor_train_batch.cpp; addresses as in bind.cpp.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "bind.h"
#include "tensor_train_batch.h"

namespace nb = nanobind;
using shardlab::binding::Address;
using shardlab::binding::at;
using shardlab::binding::step_from;
using Numbers = std::vector<int64_t>;
using Addresses = std::vector<Address>;
// `shardlab.ops.tensor_train.TensorTrain.kernel`: sizes, and where the cores begin.
using Trains = std::vector<std::pair<Numbers, Addresses>>;
// Of a memory of cores: arena, blocks and encodings; its step's numbers; (train, core) by block.
using Memory = std::tuple<Addresses, std::vector<float>, shardlab::CoreOrder>;

namespace {

// Numbers: cores, rows, columns, ranks.
shardlab::TensorTrain train_of(const Numbers& numbers, const Addresses& data) {
  shardlab::TensorTrain train{};
  size_t next = 0;
  train.cores = numbers.at(next++);
  for (int64_t k = 0; k < train.cores; ++k) train.rows[k] = numbers.at(next++);
  for (int64_t k = 0; k < train.cores; ++k) train.columns[k] = numbers.at(next++);
  for (int64_t k = 0; k <= train.cores; ++k) train.ranks[k] = numbers.at(next++);
  for (int64_t k = 0; k < train.cores; ++k) train.data[k] = at<float>(data.at(k));
  return train;
}

std::vector<shardlab::CoreStep> steps_of(const std::vector<Memory>& memories, int64_t trains,
                                         shardlab::Rule rule, int64_t key) {
  std::vector<shardlab::CoreStep> steps(trains * shardlab::kMaxCores);
  for (const auto& [where, numbers, owners] : memories) {
    const shardlab::Arena arena{at<char>(where.at(0)), at<shardlab::Block>(where.at(1)),
                                at<shardlab::Encoding>(where.at(2)), (int64_t)owners.size()};
    int64_t block = 0;
    for (const auto& [t, core] : owners)
      steps.at(t * shardlab::kMaxCores + core) = {
          arena, block++, rule, step_from(numbers), (uint64_t)key};
  }
  return steps;
}

}  // namespace

void bind_tensor_train(nb::module_& m) {
  using namespace shardlab;
  nb::class_<TensorTrainBatch>(m, "TensorTrainBatch")
      .def(nb::init<>())
      .def("rows",
           [](TensorTrainBatch& batch, const Trains& trains, Address ids, const Numbers& edges,
              Address out, int threads) {
             nb::gil_scoped_release release;
             std::vector<TensorTrain> found;
             for (const auto& [numbers, data] : trains) found.push_back(train_of(numbers, data));
             batch.rows(std::move(found), at<int64_t>(ids), edges, at<float>(out), threads);
           })
      .def("sizes", &TensorTrainBatch::sizes)
      // touched: addresses of ids, splits, sources and gradients (`TouchedSlices`).
      .def("gradients", [](TensorTrainBatch& batch, Address row_grads, const CoreOrder& order,
                           const std::vector<bool>& every, const Addresses& touched, int threads) {
        nb::gil_scoped_release release;
        batch.gradients(at<float>(row_grads), order, every,
                        {at<int64_t>(touched.at(0)), at<int64_t>(touched.at(1)),
                         at<int64_t>(touched.at(2)), at<float>(touched.at(3))},
                        threads);
      })
      .def("step", [](TensorTrainBatch& batch, Address row_grads,
                      const std::vector<Memory>& memories, int64_t trains, int64_t rule,
                      int64_t key, bool every, int threads) {
        nb::gil_scoped_release release;
        batch.step(at<float>(row_grads), steps_of(memories, trains, (Rule)rule, key), every,
                   threads);
      });
}
