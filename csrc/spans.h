// Flat vectors in spans of 256 elements, each scaled by a power of two and encoded as a row.
#pragma once
#include <cstdint>

#include "codecs.h"

namespace shardlab {

constexpr int64_t kSpanElements = 256;

// `limit`: log2 of what the largest magnitude of a scaled span stays below.
struct Spans {
  Codec codec;
  int64_t count;
  int32_t limit;
};

// payload_bytes(codec, 256) for the row, one for the power of two.
inline int64_t span_bytes(Codec codec) { return payload_bytes(codec, kSpanElements) + 1; }

struct SpanKernels {
  void (*encode)(const Spans& spans, const float* values, char* records, const Rounding& rounding,
                 int threads);
  // Writes decoded * factor, or adds it to what is there.
  void (*decode)(const Spans& spans, const char* records, float* values, float factor, bool add,
                 int threads);
  // own = (sum over all ranks, in their order) * scale; parts [ranks - 1, count] are the others'.
  void (*sum)(const float* parts, int64_t ranks, int64_t rank, int64_t count, float scale,
              float* own);
};

}  // namespace shardlab
