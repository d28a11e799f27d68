// Which keys occur in another list.
#pragma once
#include <cstdint>

namespace shardlab {

/// found[i] = keys[i] is among members; all keys and members are >= 0.
void mark_members(const int64_t* keys, int64_t num_keys, const int64_t* members,
                  int64_t num_members, bool* found);

}  // namespace shardlab
