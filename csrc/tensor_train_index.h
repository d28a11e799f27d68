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

  void build(const TensorTrain& train, const int64_t* ids, int64_t n) {
    const int64_t last = train.cores - 1;
    prefixes_.assign(ids, ids + n);
    for (int64_t k = last; k >= 0; --k) {
      Level& level = levels[k];
      const int64_t count = (int64_t)prefixes_.size(), rows = train.rows[k];
      level.digit.resize(count);
      level.parent.resize(count);
      int64_t distinct = 0, prefix = -1;
      if (k > 0) levels[k - 1].children.clear();
      for (int64_t i = 0; i < count; ++i) {
        // Ids ascend: as long as the prefix stays, a subtraction tells the digit.
        int64_t digit = prefixes_[i] - prefix * rows;
        if (k == 0) {
          digit = prefixes_[i];
        } else if (prefix < 0 || digit >= rows) {
          prefix = prefixes_[i] / rows;
          digit = prefixes_[i] - prefix * rows;
          levels[k - 1].children.push_back((int32_t)i);
          prefixes_[distinct++] = prefix;  // never ahead of what is still to be read
        }
        level.digit[i] = (int32_t)digit;
        level.parent[i] = (int32_t)(distinct - 1);
      }
      if (k > 0) levels[k - 1].children.push_back((int32_t)count);
      prefixes_.resize(distinct);
      sort_by_digit(level, rows);
    }
  }

 private:
  void sort_by_digit(Level& level, int64_t rows) {
    const int64_t count = level.size();
    counts_.assign(rows + 1, 0);
    for (int32_t digit : level.digit) ++counts_[digit + 1];
    level.groups.clear();
    for (int64_t d = 0; d < rows; ++d) {
      if (counts_[d + 1]) level.groups.push_back(counts_[d]);
      counts_[d + 1] += counts_[d];
    }
    level.groups.push_back((int32_t)count);
    level.slot.resize(count);
    level.nodes.resize(count);
    for (int64_t i = 0; i < count; ++i) {
      const int32_t place = counts_[level.digit[i]]++;
      level.slot[i] = place;
      level.nodes[place] = (int32_t)i;
    }
  }

  std::vector<int64_t> prefixes_;
  std::vector<int32_t> counts_;
};

// Columns of the product of the first k + 1 cores.
inline int64_t leading_columns(const TensorTrain& train, int64_t k) {
  int64_t product = 1;
  for (int64_t i = 0; i <= k; ++i) product *= train.columns[i];
  return product;
}

inline int64_t slice_elements(const TensorTrain& train, int64_t k) {
  return train.ranks[k] * train.columns[k] * train.ranks[k + 1];
}

// Elements of the product of a prefix of k + 1 digits.
inline int64_t node_elements(const TensorTrain& train, int64_t k) {
  return leading_columns(train, k) * train.ranks[k + 1];
}

inline int64_t product_elements(const TensorTrain& train, int64_t n) {
  int64_t total = kSlack, prefixes = train.rows[0];
  for (int64_t k = 1; k + 1 < train.cores; ++k) {
    prefixes = prefixes > n ? n : std::min(n, prefixes * train.rows[k]);
    total += (prefixes + kSlackRows) * node_elements(train, k) + kSlack;
  }
  return total;
}

}  // namespace shardlab
