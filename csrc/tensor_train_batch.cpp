#include "tensor_train_batch.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "dispatch.h"

namespace shardlab {

void TensorTrainBatch::rows(std::vector<TensorTrain> trains, const int64_t* ids,
                            const std::vector<int64_t>& edges, float* out, int threads) {
  entries_.resize(trains.size());
  for (size_t t = 0; t < trains.size(); ++t) {
    Entry& entry = entries_[t];
    entry.train = trains[t];
    entry.count = edges[t + 1] - edges[t];
    if (entry.count == 0) continue;
    entry.index.build(entry.train, ids + edges[t], entry.count);
    const int64_t elements = product_elements(entry.train, entry.count);
    if (elements > entry.room) {
      entry.products.reset(new (std::align_val_t{64}) float[elements]);
      entry.room = elements;
    }
    active_kernels().tensor_train->rows(entry.train, entry.index, entry.products.get(), out,
                                        threads);
    out += entry.count * leading_columns(entry.train, entry.train.cores - 1);
  }
}

std::pair<int64_t, int64_t> TensorTrainBatch::sizes(const CoreOrder& order,
                                                    const std::vector<bool>& every) const {
  std::pair<int64_t, int64_t> total{};
  for (const auto& [t, core] : order) {
    const int64_t slices = entries_[t].num_slices(core, every[t]);
    total.first += slices;
    total.second += slices * slice_elements(entries_[t].train, core);
  }
  return total;
}

void TensorTrainBatch::gradients(const float* row_grads, const CoreOrder& order,
                                 const std::vector<bool>& every, const TouchedSlices& touched,
                                 int threads) {
  std::vector<float*> targets(entries_.size() * kMaxCores);
  int64_t slices = 0, elements = 0;
  touched.splits[0] = 0;
  for (size_t at = 0; at < order.size(); ++at) {
    const auto [t, core] = order[at];
    const Entry& entry = entries_[t];
    const int64_t size = slice_elements(entry.train, core);
    const int64_t count = entry.num_slices(core, every[t]);
    targets[t * kMaxCores + core] = touched.grads + elements;
    for (int64_t i = 0; i < count; ++i, ++slices, elements += size) {
      const Level& level = entry.index.levels[core];
      touched.ids[slices] = every[t] ? i : level.digit[level.nodes[level.groups[i]]];
      touched.sources[slices] = elements;
    }
    if (every[t]) std::fill_n(touched.grads + elements - count * size, count * size, 0.f);
    touched.splits[at + 1] = slices;
  }
  for_entries(row_grads, [&](size_t t, const Entry& entry, const float* grads) {
    float** wanted = &targets[t * kMaxCores];
    const int64_t cores = entry.train.cores;
    if (std::all_of(wanted, wanted + cores, [](const float* target) { return !target; })) return;
    for (int64_t core = 0; core < cores; ++core)
      if (!wanted[core])
        throw std::invalid_argument("order: core " + std::to_string(core) + " of train " +
                                    std::to_string(t) + " is missing; list every core of a train");
    active_kernels().tensor_train->gradients(entry.train, entry.index, entry.products.get(), grads,
                                             every[t], wanted, threads);
  });
}

void TensorTrainBatch::step(const float* row_grads, const std::vector<CoreStep>& cores, bool every,
                            int threads) {
  for_entries(row_grads, [&](size_t t, const Entry& entry, const float* grads) {
    const CoreStep* own = &cores.at(t * kMaxCores);
    if (own->arena.bytes)
      active_kernels().tensor_train->step(entry.train, entry.index, entry.products.get(), grads,
                                          every, own, threads);
  });
}

}  // namespace shardlab
