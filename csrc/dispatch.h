#pragma once
#include <vector>

#include "chunks.h"
#include "codecs.h"
#include "interaction.h"
#include "linear.h"
#include "rows.h"
#include "scatter.h"
#include "spans.h"
#include "tensor_train.h"

namespace shardlab {

// All kernels compiled for one instruction set.
struct Kernels {
  const char* name;
  const RowKernels* rows;
  const InteractionKernels* interaction;
  const LinearKernels* linear;
  const CodecKernels* codecs;
  const ScatterKernels* scatter;
  const TensorTrainKernels* tensor_train;
  const ChunkKernels* chunks;
  const SpanKernels* spans;
};

// Those that this build and this processor have, widest first; the portable ones are always last.
const std::vector<Kernels>& available_kernels();
// The widest, or the one that the environment variable SHARDLAB_ISA names when it can run here.
const Kernels& active_kernels();
// Whether the active kernels and the processor have bf16 products (LinearKernels).
bool has_bf16_products();
// "intel", "amd" or "other".
const char* processor_vendor();

}  // namespace shardlab
