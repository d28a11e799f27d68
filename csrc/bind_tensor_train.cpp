// Python face of tensor_train.cpp; addresses as in bind.cpp.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include "bind.h"
#include "dispatch.h"
#include "tensor_train_index.h"

namespace nb = nanobind;
using Address = uintptr_t;
using Numbers = std::vector<int64_t>;
using Addresses = std::vector<Address>;

namespace {

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Numbers of `shardlab.ops.tensor_train.TensorTrain.numbers`: cores, rows, columns, ranks.
shardlab::TensorTrain train_of(const Numbers& numbers, const Addresses& data) {
  shardlab::TensorTrain train{};
  size_t next = 0;
  train.cores = numbers.at(next++);
  for (int64_t k = 0; k < train.cores; ++k) train.rows[k] = numbers.at(next++);
  for (int64_t k = 0; k < train.cores; ++k) train.columns[k] = numbers.at(next++);
  for (int64_t k = 0; k <= train.cores; ++k) train.ranks[k] = numbers.at(next++);
  for (int64_t k = 0; k < train.cores && !data.empty(); ++k)
    train.data[k] = at<float>(data.at(k));
  return train;
}

}  // namespace

void bind_tensor_train(nb::module_& m) {
  using namespace shardlab;
  m.def("tensor_train_product_elements", [](const Numbers& numbers, int64_t n) {
    return product_elements(train_of(numbers, {}), n);
  });
  m.def("tensor_train_rows", [](const Numbers& numbers, const Addresses& data, Address ids,
                                int64_t n, Address products, Address out, int threads) {
    nb::gil_scoped_release release;
    active_kernels().tensor_train->rows(train_of(numbers, data), at<int64_t>(ids), n,
                                        at<float>(products), at<float>(out), threads);
  });
  m.def("tensor_train_gradients",
        [](const Numbers& numbers, const Addresses& data, Address ids, int64_t n,
           Address products, Address row_grads, const Addresses& touched, const Addresses& grads,
           int threads) -> Numbers {
          nb::gil_scoped_release release;
          Numbers counts(kMaxCores);
          int64_t* lists[kMaxCores] = {};
          float* targets[kMaxCores] = {};
          for (size_t k = 0; k < touched.size(); ++k)
            lists[k] = at<int64_t>(touched[k]), targets[k] = at<float>(grads.at(k));
          active_kernels().tensor_train->gradients(train_of(numbers, data), at<int64_t>(ids), n,
                                                   at<float>(products), at<float>(row_grads),
                                                   lists, targets, counts.data(), threads);
          return counts;
        });
}
