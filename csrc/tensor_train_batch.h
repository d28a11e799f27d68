// Several tensor trains that one call reads or learns: what it keeps from the read to the gradients.
#pragma once
#include <cstdint>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "tensor_train_index.h"

namespace shardlab {

// Cores of trains in the order in which their gradients are wanted: (train, core).
using CoreOrder = std::vector<std::pair<int64_t, int64_t>>;

// Where the slices that got a gradient are listed, core after core: ids, where each core's begin
// and the end, where each slice's gradient begins in `grads`.
struct TouchedSlices {
  int64_t *ids, *splits, *sources;
  float* grads;
};

class TensorTrainBatch {
 public:
  TensorTrainBatch() = default;
  TensorTrainBatch(const TensorTrainBatch&) = delete;

  // Indexes the ids [edges[t], edges[t + 1]) of every train t, and computes their rows, one behind
  // the other.
  void rows(std::vector<TensorTrain> trains, const int64_t* ids, const std::vector<int64_t>& edges,
            float* out, int threads);

  // (slices, elements) of the gradients of the ids last read. A train with every[t] set gets one
  // for each of its slices, unless it has no id.
  std::pair<int64_t, int64_t> sizes(const CoreOrder& order, const std::vector<bool>& every) const;

  // Gradients of the ids last read; no core may have changed since. Trains of which `order` names
  // no core are left out.
  void gradients(const float* row_grads, const CoreOrder& order, const std::vector<bool>& every,
                 const TouchedSlices& touched, int threads);

  // Steps the cores by those gradients. cores: kMaxCores per train; trains whose first one has no
  // arena are left out. `every` also steps slices that no id meets, of trains that have an id.
  void step(const float* row_grads, const std::vector<CoreStep>& cores, bool every, int threads);

 private:
  struct Free {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };
  struct Entry {
    TensorTrain train{};
    TrainIndex index;
    int64_t count = 0, room = 0;
    std::unique_ptr<float[], Free> products;

    int64_t num_slices(int64_t core, bool every) const {
      if (count == 0) return 0;
      return every ? train.rows[core] : index.levels[core].num_groups();
    }
  };

  // visit(t, entry, gradients of its rows) of every train that has ids.
  template <class Visit>
  void for_entries(const float* row_grads, const Visit& visit) {
    for (size_t t = 0; t < entries_.size(); ++t) {
      const Entry& entry = entries_[t];
      if (entry.count == 0) continue;
      visit(t, entry, row_grads);
      row_grads += entry.count * leading_columns(entry.train, entry.train.cores - 1);
    }
  }

  std::vector<Entry> entries_;
};

}  // namespace shardlab
