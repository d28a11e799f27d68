// Spans of gradients: scaled, encoded, decoded and added up in one pass over memory; sixteen spans
// at a time lie in the first-level cache between the steps. Format: shardlab/ops/spans.py.
// Source: own.
#include "spans.h"

#include <omp.h>

#include <algorithm>

#include "codec.h"
#include "random.h"

namespace shardlab::SHARDLAB_ISA {
namespace {

constexpr int32_t kInfinity = 0x7f800000, kFractionBits = 23;
constexpr int32_t kLargestPower = 126, kPowerBias = 127, kNotFinite = 255;
typedef float Scratch[kLanes][kSpanElements];

float power_of_two(int32_t power) { return as_float((power + 127) << kFractionBits); }

int32_t largest_bits(const float* values) {
  Int amax{};
  for (int64_t c = 0; c < kSpanElements; c += kLanes)
    amax = larger(amax, (Int)load(values + c) & 0x7fffffff);
  return reduce_max(amax);
}

int32_t power_for(int32_t bits, int32_t limit) {
  const int32_t exponent = (bits >> kFractionBits) - 126;  // of a fraction in [0.5, 1)
  return bits ? std::min(limit - exponent, kLargestPower) : 0;
}

// Writes the scaled span; returns the byte of its power.
uint8_t scale_span(const float* values, int32_t limit, float* out) {
  const int32_t bits = largest_bits(values);
  if (bits >= kInfinity) {
    std::fill(out, out + kSpanElements, 0.0f);
    return kNotFinite;
  }
  const int32_t power = power_for(bits, limit);
  const float scale = power_of_two(power);
  for (int64_t c = 0; c < kSpanElements; c += kLanes) store(out + c, load(values + c) * scale);
  return (uint8_t)(power + kPowerBias);
}

template <bool kAdd>
void write_span(const float* decoded, float back, float factor, float* out) {
  for (int64_t c = 0; c < kSpanElements; c += kLanes) {
    const Vec value = load(decoded + c) * back * factor;
    store(out + c, kAdd ? load(out + c) + value : value);
  }
}

// body(batch, scratch, first span) for batches of up to sixteen spans.
template <class Body>
void for_batches(const Spans& spans, const char* records, int threads, const Body& body) {
  const int64_t bytes = span_bytes(spans.codec);
#pragma omp parallel num_threads(threads)
  {
    alignas(64) Scratch scratch;
    const int64_t parts = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t end = spans.count * (me + 1) / parts;
    for (int64_t first = spans.count * me / parts; first < end; first += kLanes) {
      CodeBatch batch{std::min<int64_t>(kLanes, end - first), kSpanElements, {}, {}, {},
                      part_counter(0, 0), {}};
      for (int64_t i = 0; i < batch.count; ++i) {
        batch.values[i] = scratch[i];
        batch.records[i] = const_cast<char*>(records) + (first + i) * bytes;
      }
      body(batch, first);
    }
  }
}

void encode(const Spans& spans, const float* values, char* records, const Rounding& rounding,
            int threads) {
  const auto run = codec_ops[(int64_t)spans.codec].encode[rounding.stochastic];
  const int64_t payload = payload_bytes(spans.codec, kSpanElements);
  for_batches(spans, records, threads, [&](CodeBatch& batch, int64_t first) {
    for (int64_t i = 0; i < batch.count; ++i) {
      batch.words[i] = row_word(rounding.key, rounding.first_row + first + i);
      batch.records[i][payload] = (char)scale_span(values + (first + i) * kSpanElements,
                                                   spans.limit, batch.values[i]);
    }
    run(batch);
  });
}

void decode(const Spans& spans, const char* records, float* values, float factor, bool add,
            int threads) {
  const auto run = codec_ops[(int64_t)spans.codec].decode;
  const int64_t payload = payload_bytes(spans.codec, kSpanElements);
  for_batches(spans, records, threads, [&](CodeBatch& batch, int64_t first) {
    run(batch);
    for (int64_t i = 0; i < batch.count; ++i) {
      const uint8_t code = (uint8_t)batch.records[i][payload];
      const float back = code == kNotFinite ? as_float(0x7fc00000)
                                            : power_of_two(kPowerBias - code);
      float* out = values + (first + i) * kSpanElements;
      if (add)
        write_span<true>(batch.values[i], back, factor, out);
      else
        write_span<false>(batch.values[i], back, factor, out);
    }
  });
}

void sum(const float* parts, int64_t ranks, int64_t rank, int64_t count, float scale,
         float* own) {
  for (int64_t first = 0; first < count; first += kSpanElements) {
    const int64_t n = std::min(kSpanElements, count - first);
    float total[kSpanElements] = {};
    for (int64_t r = 0; r < ranks; ++r) {
      const float* from = r == rank ? own : parts + (r < rank ? r : r - 1) * count;
      for (int64_t i = 0; i < n; ++i) total[i] += from[first + i];
    }
    for (int64_t i = 0; i < n; ++i) own[first + i] = total[i] * scale;
  }
}

}  // namespace

extern const SpanKernels span_kernels{encode, decode, sum};

}  // namespace shardlab::SHARDLAB_ISA
