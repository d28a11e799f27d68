#pragma once
#include "chunks.h"

namespace shardlab::SHARDLAB_ISA {

// `ChunkKernels::read`.
void read_chunks(const ChunkCall& call, const Arena& arena, const ChunkReads& reads,
                 const int64_t* ids, const Csr* entries, int64_t* slots, float* out, int threads);

}  // namespace shardlab::SHARDLAB_ISA
