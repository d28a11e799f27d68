#include "members.h"

#include <cstddef>
#include <vector>

namespace shardlab {
namespace {

// Open addressing, at most half full; -1 is an empty place.
class Set {
 public:
  explicit Set(int64_t members) {
    int bits = 4;
    while ((int64_t{1} << bits) < 2 * members) ++bits;
    shift_ = 64 - bits;
    places_.assign(std::size_t{1} << bits, -1);
  }

  void add(int64_t key) {
    std::size_t at = first(key);
    while (places_[at] >= 0 && places_[at] != key) at = (at + 1) & (places_.size() - 1);
    places_[at] = key;
  }

  bool has(int64_t key) const {
    std::size_t at = first(key);
    while (places_[at] >= 0 && places_[at] != key) at = (at + 1) & (places_.size() - 1);
    return places_[at] == key;
  }

 private:
  // Knuth's multiplicative hashing: 2^64 / golden ratio spreads neighbours over the table.
  std::size_t first(int64_t key) const { return ((uint64_t)key * 0x9E3779B97F4A7C15ull) >> shift_; }

  std::vector<int64_t> places_;
  int shift_;
};

}  // namespace

void mark_members(const int64_t* keys, int64_t num_keys, const int64_t* members,
                  int64_t num_members, bool* found) {
  Set set(num_members);
  for (int64_t i = 0; i < num_members; ++i) set.add(members[i]);
  for (int64_t i = 0; i < num_keys; ++i) found[i] = set.has(keys[i]);
}

}  // namespace shardlab
