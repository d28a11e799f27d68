// Picks the widest instruction set that both this build and this processor have.
#include "dispatch.h"

#include <cstdlib>
#include <cstring>

namespace shardlab {

#define SHARDLAB_DECLARE(isa)                                                        \
  namespace isa {                                                                    \
  extern const RowKernels row_kernels;                                               \
  extern const InteractionKernels interaction_kernels;                               \
  extern const LinearKernels linear_kernels;                                         \
  extern const CodecKernels codec_kernels;                                           \
  extern const ScatterKernels scatter_kernels;                                       \
  extern const TensorTrainKernels tensor_train_kernels;                              \
  extern const ChunkKernels chunk_kernels;                                           \
  extern const SpanKernels span_kernels;                                             \
  static const Kernels all{#isa,                  &row_kernels,   &interaction_kernels, \
                           &linear_kernels,       &codec_kernels, &scatter_kernels,     \
                           &tensor_train_kernels, &chunk_kernels, &span_kernels};       \
  }

SHARDLAB_DECLARE(portable)
#ifdef SHARDLAB_HAVE_avx2
SHARDLAB_DECLARE(avx2)
#endif
#ifdef SHARDLAB_HAVE_avx512
SHARDLAB_DECLARE(avx512)
#endif

const std::vector<Kernels>& available_kernels() {
  static const std::vector<Kernels> found = [] {
    std::vector<Kernels> kernels;
#ifdef SHARDLAB_HAVE_avx512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      kernels.push_back(avx512::all);
#endif
#ifdef SHARDLAB_HAVE_avx2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
      kernels.push_back(avx2::all);
#endif
    kernels.push_back(portable::all);
    return kernels;
  }();
  return found;
}

const Kernels& active_kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    const auto& found = available_kernels();
    if (const char* wanted = std::getenv("SHARDLAB_ISA"))
      for (const Kernels& kernels : found)
        if (std::strcmp(kernels.name, wanted) == 0) return kernels;
    return found.front();
  }();
  return chosen;
}

bool has_bf16_products() {
#if defined(__x86_64__)
  return active_kernels().linear->forward_bf16 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

const char* processor_vendor() {
#if defined(__x86_64__)
  if (__builtin_cpu_is("amd")) return "amd";
  if (__builtin_cpu_is("intel")) return "intel";
#endif
  return "other";
}

}  // namespace shardlab
