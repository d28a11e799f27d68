// Digits of ids, and the order in which they meet the slices of every core: counting sorts.
#include "tensor_train_index.h"

namespace shardlab {

void TrainIndex::build(const TensorTrain& train, const int64_t* ids, int64_t n) {
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

void TrainIndex::sort_by_digit(Level& level, int64_t rows) {
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

}  // namespace shardlab
