// Picks the widest instruction set that both this build and this processor have.
#include "dispatch.h"

#include <cstdlib>
#include <cstring>

namespace shardlab {

namespace portable {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> found;
#ifdef SHARDLAB_HAVE_avx512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    found.push_back(&avx512::kernels);
#endif
#ifdef SHARDLAB_HAVE_avx2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    found.push_back(&avx2::kernels);
#endif
  found.push_back(&portable::kernels);
  return found;
}

const Kernels& active_kernels() {
  static const Kernels* chosen = [] {
    const auto found = available_kernels();
    if (const char* wanted = std::getenv("SHARDLAB_ISA"))
      for (const Kernels* kernels : found)
        if (std::strcmp(kernels->name, wanted) == 0) return kernels;
    return found.front();
  }();
  return *chosen;
}

}  // namespace shardlab
