// Which products of cores a batch of ids needs: the distinct prefixes of every length, and the
// slices of every core that they meet.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "tensor_train.h"

namespace shardlab {

// Room behind every matrix that tiles may read, and whose values they then drop.
constexpr int64_t kSlackRows = 8, kSlack = 64;

// The nodes of a level are the distinct prefixes of that many digits, in ascending order; those of
// the last level are the ids. `slots` orders them by their last digit, stable: all nodes that
// multiply with one slice of the core stand side by side, and products are laid in that order.
struct Level {
  std::vector<int32_t> parent;   // node of the level before, of every node
  std::vector<int32_t> digit;    // slice of the core
  std::vector<int32_t> slot;     // place of every node
  std::vector<int32_t> nodes;    // node at every place
  std::vector<int32_t> groups;   // first place of every slice that is met, and the end
  std::vector<int32_t> children; // first node of the next level, of every node, and the end

  int64_t size() const { return (int64_t)digit.size(); }
  int64_t num_groups() const { return (int64_t)groups.size() - 1; }
};

struct TrainIndex {
  Level levels[kMaxCores];

  // Of ids that ascend and differ. It has a source of its own: the instruction sets share it.
  void build(const TensorTrain& train, const int64_t* ids, int64_t n);

  // The slice of core k that a group of nodes multiplies with.
  int64_t digit_of_group(int64_t k, int64_t group) const {
    const Level& level = levels[k];
    return level.digit[level.nodes[level.groups[group]]];
  }
  // The place of its gradient among those of its core: of all slices, or of those met.
  int64_t place_of_group(int64_t k, int64_t group, bool every) const {
    return every ? digit_of_group(k, group) : group;
  }

 private:
  void sort_by_digit(Level& level, int64_t rows);

  std::vector<int64_t> prefixes_;
  std::vector<int32_t> counts_;
};

// Columns of the product of the first k + 1 cores.
static inline int64_t leading_columns(const TensorTrain& train, int64_t k) {
  int64_t product = 1;
  for (int64_t i = 0; i <= k; ++i) product *= train.columns[i];
  return product;
}

static inline int64_t slice_elements(const TensorTrain& train, int64_t k) {
  return train.ranks[k] * train.columns[k] * train.ranks[k + 1];
}

// Elements of the product of a prefix of k + 1 digits.
static inline int64_t node_elements(const TensorTrain& train, int64_t k) {
  return leading_columns(train, k) * train.ranks[k + 1];
}

static inline int64_t product_elements(const TensorTrain& train, int64_t n) {
  int64_t total = kSlack, prefixes = train.rows[0];
  for (int64_t k = 1; k + 1 < train.cores; ++k) {
    prefixes = prefixes > n ? n : std::min(n, prefixes * train.rows[k]);
    total += (prefixes + kSlackRows) * node_elements(train, k) + kSlack;
  }
  return total;
}

}  // namespace shardlab
