// The optimisers' rules on batches of rows. Source: exact fused optimisers as in arXiv 2104.05158.
#pragma once
#include "lanes.h"
#include "rows.h"

namespace shardlab::SHARDLAB_ISA {

// Rows are stepped in batches of kLanes. A rule gets the summed gradient of each (already scaled)
// and steps payload and state once. Row-wise rules take the square roots and divisions of a batch
// at once: one row after the other they are a chain of latencies, 30 ns a row.
//
// Rows tells where payloads are: rows[i] reads and writes lanes of the batch's row i as fp32. While
// row i is worked on, rows.prefetch_state(i), rows.prefetch_row(i) and the gradient `coming` fetch
// the next batch's: all at once they would fill the queue of outstanding lines, and then leave the
// memory idle.
struct Batch {
  int64_t count, columns;
  const float* grad[kLanes];
  float* state[kLanes];
  const float* row_squares;  // of the batch, or null
  const float* coming[kLanes];  // first gradients of the next batch's rows, or null
};

// Mean of grad^2 of every row of the batch.
template <class Rows>
inline Vec mean_squares(const Batch& batch, const Rows& rows) {
  float mean[kLanes] = {};
  for (int64_t i = 0; i < batch.count; ++i) {
    rows.prefetch_state(i);
    if (batch.row_squares && batch.row_squares[i] >= 0) {
      mean[i] = batch.row_squares[i];
      continue;
    }
    Vec total{};
    for_columns(batch.columns, [&](int64_t c, int lanes) SHARDLAB_INLINE {
      const Vec g = read(batch.grad[i] + c, lanes);
      total += g * g;
    });
    mean[i] = reduce_add(total) / (float)batch.columns;
  }
  return load(mean);
}

inline Vec gather_state(const Batch& batch, int64_t at) {
  float value[kLanes] = {};
  for (int64_t i = 0; i < batch.count; ++i) value[i] = batch.state[i][at];
  return load(value);
}

inline void scatter_state(const Batch& batch, int64_t at, Vec values) {
  float value[kLanes];
  store(value, values);
  for (int64_t i = 0; i < batch.count; ++i) batch.state[i][at] = value[i];
}

// Calls body(row, state, grad, i) for every row of the batch. Row-wise rules have called
// mean_squares before.
template <bool kRowWise, class Rows, class Body>
SHARDLAB_INLINE inline void for_rows(const Batch& batch, const Rows& rows, const Body& body) {
  for (int64_t i = 0; i < batch.count; ++i) {
    if (!kRowWise) rows.prefetch_state(i);
    rows.prefetch_row(i);
    if (batch.coming[i]) prefetch_read(batch.coming[i], batch.columns * sizeof(float));
    body(rows[i], batch.state[i], batch.grad[i], i);
  }
}

struct Sgd {
  template <class Rows>
  static void step(const Batch& batch, const Rows& rows, const Step& s) {
    for_rows<false>(batch, rows, [&](auto row, float*, const float* grad, int64_t) SHARDLAB_INLINE {
      for_columns(batch.columns, [&](int64_t c, int lanes) SHARDLAB_INLINE {
        const Vec w = row.read(c, lanes);
        row.write(c, w - (read(grad + c, lanes) + w * s.weight_decay) * s.lr, lanes);
      });
    });
  }
};

struct Adagrad {
  template <class Rows>
  static void step(const Batch& batch, const Rows& rows, const Step& s) {
    for_rows<false>(batch, rows, [&](auto row, float* state, const float* grad,
                                     int64_t) SHARDLAB_INLINE {
      for_columns(batch.columns, [&](int64_t c, int lanes) SHARDLAB_INLINE {
        const Vec g = read(grad + c, lanes);
        const Vec h = read(state + c, lanes) + g * g;
        write_lanes(state + c, h, lanes);
        row.write(c, row.read(c, lanes) - g * s.lr / (sqrt(h) + s.eps), lanes);
      });
    });
  }
};

struct RowWiseAdagrad {
  template <class Rows>
  static void step(const Batch& batch, const Rows& rows, const Step& s) {
    const Vec h = gather_state(batch, 0) + mean_squares(batch, rows);
    scatter_state(batch, 0, h);
    float rate[kLanes];
    store(rate, s.lr / (sqrt(h) + s.eps));
    for_rows<true>(batch, rows, [&](auto row, float*, const float* grad,
                                    int64_t i) SHARDLAB_INLINE {
      for_columns(batch.columns, [&](int64_t c, int lanes) SHARDLAB_INLINE {
        row.write(c, row.read(c, lanes) - read(grad + c, lanes) * rate[i], lanes);
      });
    });
  }
};

struct Adam {
  template <class Rows>
  static void step(const Batch& batch, const Rows& rows, const Step& s) {
    for_rows<false>(batch, rows, [&](auto row, float* state, const float* grad,
                                     int64_t) SHARDLAB_INLINE {
      float *first = state, *second = state + batch.columns;
      for_columns(batch.columns, [&](int64_t c, int lanes) SHARDLAB_INLINE {
        const Vec g = read(grad + c, lanes);
        const Vec m = read(first + c, lanes) * s.beta1 + g * s.rest1;
        const Vec v = read(second + c, lanes) * s.beta2 + g * g * s.rest2;
        write_lanes(first + c, m, lanes);
        write_lanes(second + c, v, lanes);
        const Vec step = (m / s.bias1) / (sqrt(v / s.bias2) + s.eps);
        row.write(c, row.read(c, lanes) - step * s.lr, lanes);
      });
    });
  }
};

struct RowWiseAdam {
  template <class Rows>
  static void step(const Batch& batch, const Rows& rows, const Step& s) {
    const int64_t at = batch.columns;
    const Vec v = gather_state(batch, at) * s.beta2 + mean_squares(batch, rows) * s.rest2;
    scatter_state(batch, at, v);
    float rate[kLanes];
    store(rate, (s.lr / s.bias1) / (sqrt(v / s.bias2) + s.eps));
    for_rows<true>(batch, rows, [&](auto row, float* state, const float* grad,
                                    int64_t i) SHARDLAB_INLINE {
      for_columns(batch.columns, [&](int64_t c, int lanes) SHARDLAB_INLINE {
        const Vec m = read(state + c, lanes) * s.beta1 + read(grad + c, lanes) * s.rest1;
        write_lanes(state + c, m, lanes);
        row.write(c, row.read(c, lanes) - m * rate[i], lanes);
      });
    });
  }
};

}  // namespace shardlab::SHARDLAB_ISA
