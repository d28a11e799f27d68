// One sample at a time, in the first-level cache: forward multiplies X with its transpose by
// register tiles that skip everything left of the diagonal; backward multiplies the symmetric
// matrix of gradients with X. Nothing of size B x N x N ever exists.
#include "interaction.h"

#include <algorithm>
#include <cstring>

#include "tile.h"

namespace shardlab::SHARDLAB_ISA {
namespace {

// Rows of a tile: 9 divides the 27 vectors of the Criteo tables, and 9 x 2 accumulators fit 32
// registers; 6 x 2 fit 16.
#if defined(__AVX512F__)
constexpr int kRows = 9;
#else
constexpr int kRows = 6;
#endif
constexpr int kVecs = 2;
constexpr int64_t kSide = 4;  // of the blocks that are mirrored

// Sizes of one sample's scratch matrices, padded to whole vectors and tiles.
struct Layout {
  int64_t vectors, columns, products, row_pad, wide, deep;

  explicit Layout(const InteractionShape& s)
      : vectors(s.features + 1),
        columns(s.columns),
        products(vectors * (vectors - 1) / 2),
        row_pad(round_up(vectors, kRows)),
        wide(round_up(row_pad, kWidth)),
        deep(round_up(s.columns, kWidth)) {}

  int64_t out_width() const { return columns + products; }
};

// What the next sample reads, fetched part by part while this one is computed.
class Ahead {
 public:
  Ahead(const float* from, int64_t count, int64_t parts)
      : at_(from), end_(from + count), step_((count + parts - 1) / parts) {}

  void fetch() {
    const float* to = std::min(at_ + step_, end_);
    for (; at_ < to; at_ += kLineFloats) __builtin_prefetch(at_);
  }

 private:
  static constexpr int64_t kLineFloats = 16;
  const float *at_, *end_;
  int64_t step_;
};

// out[R, width] = a[R, steps] b[steps, width] for the columns from `first` on, whole vectors.
void tile_row(int64_t steps, TileRows a, const float* b, int64_t stride, int64_t first,
              int64_t width, float* out) {
  int64_t c = first;
  for (; c + kVecs * kWidth <= width; c += kVecs * kWidth) {
    Wide sum[kRows][kVecs];
    tile<MultiplyAdd>(steps, a, b + c, stride, sum);
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVecs; ++v) wide_store(out + r * stride + c + v * kWidth, sum[r][v]);
  }
  for (; c < width; c += kWidth) {
    Wide sum[kRows][1];
    tile<MultiplyAdd>(steps, a, b + c, stride, sum);
    for (int r = 0; r < kRows; ++r) wide_store(out + r * stride + c, sum[r][0]);
  }
}

// ---------------------------------------------------------------- forward
class ForwardSample {
 public:
  explicit ForwardSample(const Layout& layout)
      : l_(layout),
        turned_(l_.columns * l_.wide),
        dots_(l_.row_pad * l_.wide + kWidth),
        row_(l_.out_width() + kWidth) {}

  void run(const float* bottom, const float* pooled, float* out, Ahead ahead) {
    transpose(bottom, l_.columns, 1, l_.columns, turned_.data(), l_.wide);
    transpose(pooled, l_.columns, l_.vectors - 1, l_.columns, turned_.data() + 1, l_.wide);
    for (int64_t i = 0; i < l_.row_pad; i += kRows) {
      ahead.fetch();
      tile_row(l_.columns, {turned_.data() + i, 1, l_.wide}, turned_.data(), l_.wide,
               (i + 1) / kWidth * kWidth, l_.wide, dots_.data() + i * l_.wide);
    }
    std::memcpy(row_.data(), bottom, l_.columns * sizeof(float));
    float* to = row_.data() + l_.columns;
    for (int64_t i = 0; i + 1 < l_.vectors; ++i) {
      // Whole vectors: what runs over the end of this row is overwritten by the next.
      const float* from = dots_.data() + i * l_.wide + i + 1;
      const int64_t count = l_.vectors - 1 - i;
      for (int64_t c = 0; c < count; c += kWidth) wide_store(to + c, wide_load(from + c));
      to += count;
    }
    std::memcpy(out, row_.data(), l_.out_width() * sizeof(float));
  }

 private:
  Layout l_;
  Scratch turned_, dots_, row_;  // [D, wide], [row_pad, wide], [out_width]
};

void forward(const InteractionShape& s, const float* bottom, const float* pooled, float* out,
             int threads) {
  const Layout layout(s);
  const int64_t pooled_width = s.features * s.columns;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    ForwardSample sample(layout);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < s.batch; ++b) {
      const float* vectors = pooled + b * pooled_width;
      const int64_t next = b + 1 < s.batch ? pooled_width : 0;
      sample.run(bottom + b * s.columns, vectors, out + b * layout.out_width(),
                 {vectors + next, next, layout.row_pad / kRows});
    }
  }
}

// ---------------------------------------------------------------- backward
class BackwardSample {
 public:
  explicit BackwardSample(const Layout& layout)
      : l_(layout),
        products_(l_.products + kWidth),
        pairs_(l_.row_pad * l_.wide + kWidth),
        rows_(l_.vectors * l_.deep),
        grads_(l_.row_pad * l_.deep) {}

  void run(const float* grad, const float* bottom, const float* pooled, float* grad_bottom,
           float* grad_pooled, Ahead ahead) {
    fill_pairs(grad + l_.columns);
    copy_rows(bottom, l_.columns, rows_.data(), l_.deep, 1);
    copy_rows(pooled, l_.columns, rows_.data() + l_.deep, l_.deep, l_.vectors - 1);
    for (int64_t i = 0; i < l_.row_pad; i += kRows) {
      ahead.fetch();
      tile_row(l_.vectors, {pairs_.data() + i * l_.wide, l_.wide, 1}, rows_.data(), l_.deep, 0,
               l_.deep, grads_.data() + i * l_.deep);
    }
    for (int64_t d = 0; d < l_.columns; ++d) grad_bottom[d] = grads_.data()[d] + grad[d];
    copy_rows(grads_.data() + l_.deep, l_.deep, grad_pooled, l_.columns, l_.vectors - 1);
  }

 private:
  // The symmetric matrix of the products' gradients; its diagonal stays zero. Its upper half is
  // written in whole vectors, whose ends run into padding that nobody reads and into the next row's
  // part of the lower half, which is written after it.
  void fill_pairs(const float* grad) {
    const int64_t n = l_.vectors;
    std::memcpy(products_.data(), grad, l_.products * sizeof(float));
    const float* from = products_.data();
    for (int64_t i = 0; i + 1 < n; ++i) {
      float* across = pairs_.data() + i * l_.wide + i + 1;
      const int64_t count = n - 1 - i;
      for (int64_t c = 0; c < count; c += kWidth) wide_store(across + c, wide_load(from + c));
      from += count;
    }
    for (int64_t i = 0; i < n; i += kSide) {
      const int64_t rows = std::min(kSide, n - i);
      float* block = pairs_.data() + i * l_.wide + i;
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = r + 1; c < rows; ++c) block[c * l_.wide + r] = block[r * l_.wide + c];
      if (rows == kSide)
        transpose(block + kSide, l_.wide, kSide, n - i - kSide, block + kSide * l_.wide, l_.wide);
    }
  }

  void copy_rows(const float* from, int64_t from_stride, float* to, int64_t to_stride,
                 int64_t count) const {
    if (from_stride == to_stride) {
      std::memcpy(to, from, count * l_.columns * sizeof(float));
      return;
    }
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(to + i * to_stride, from + i * from_stride, l_.columns * sizeof(float));
  }

  Layout l_;
  // [N (N - 1) / 2], [row_pad, wide], [N, deep], [row_pad, deep]
  Scratch products_, pairs_, rows_, grads_;
};

void backward(const InteractionShape& s, const float* grad, const float* bottom,
              const float* pooled, float* grad_bottom, float* grad_pooled, int threads) {
  const Layout layout(s);
  const int64_t pooled_width = s.features * s.columns;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    BackwardSample sample(layout);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < s.batch; ++b) {
      const int64_t next = b + 1 < s.batch ? pooled_width : 0;
      sample.run(grad + b * layout.out_width(), bottom + b * s.columns, pooled + b * pooled_width,
                 grad_bottom + b * s.columns, grad_pooled + b * pooled_width,
                 {pooled + b * pooled_width + next, next, layout.row_pad / kRows});
    }
  }
}

}  // namespace

extern const InteractionKernels interaction_kernels{forward, backward};

}  // namespace shardlab::SHARDLAB_ISA
