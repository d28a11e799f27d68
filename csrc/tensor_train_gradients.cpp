// Exact gradients of the cores of tensor trains (arXiv 2101.11714), and their optimiser step.
//
//   backward  dG_k[i] = sum P_(k-1)^T dP_k         over the prefixes that end with slice i
//             dP_(k-1) = sum dP_k G_k[i_k]^T       over the prefixes that go on from it
//
// Products as in tensor_train.cpp. A slice's gradient is stored, or stepped at once: all that reads
// a core has read it by then. A group's parents are gathered from the first core, which is stepped
// last; the last core's slices are read by the level before they are stepped; those of the others
// are read by their own group only. One thread computes an element, in an order that depends on the
// ids alone.
//
// Source: TT-Rec (arXiv 2101.11714); grouping by slice and the step inside: own.
#include "tensor_train_gradients.h"

#include <omp.h>

#include "tensor_train_products.h"
#include "update.h"

namespace shardlab::SHARDLAB_ISA {
namespace {

// Rows of the last product that are computed together: each loads a lane of the slice once.
constexpr int kRowsTogether = 8;
// Nodes of the last level whose products are asked for ahead: 32 lines at rank 32, about as many as
// a core can wait for.
constexpr int64_t kNodesAhead = 4;

// target[i][r] = sum over terms t of weight(t, i) * vector(t)[r], i < count <= kRowsTogether.
// `walk(visit)` calls visit(vector, weights, weight_step) for every term in order.
template <int kCount, class Walk>
inline __attribute__((always_inline)) void combine(int64_t rank, const Walk& walk, float* target) {
  for (int64_t r = 0; r < rank; r += kWidth) {
    const int64_t lanes = std::min<int64_t>(kWidth, rank - r);
    Wide sum[kCount] = {};
    walk([&](const float* vector, const float* weights, int64_t step) __attribute__((
             always_inline)) {
      const Wide value = wide_load_part(vector + r, lanes);
      for (int i = 0; i < kCount; ++i) sum[i] = sum[i] + weights[i * step] * value;
    });
    for (int i = 0; i < kCount; ++i) wide_store_part(target + i * rank + r, sum[i], lanes);
  }
}

template <class MakeWalk>
inline void combine_rows(int64_t count, int64_t rank, const MakeWalk& walk_from, float* target) {
  int64_t i = 0;
  for (; i + kRowsTogether <= count; i += kRowsTogether)
    combine<kRowsTogether>(rank, walk_from(i), target + i * rank);
  for (; i + 4 <= count; i += 4) combine<4>(rank, walk_from(i), target + i * rank);
  for (; i + 2 <= count; i += 2) combine<2>(rank, walk_from(i), target + i * rank);
  for (; i < count; ++i) combine<1>(rank, walk_from(i), target + i * rank);
}

struct Backward {
  const TensorTrain& train;
  const TrainIndex& index;
  Products products, grads;        // P_k, and dP_k in the same order
  float* before[kMaxCores];        // dP_(k-1) of every node of level k, before it is summed
  const float* row_grads;
  float* first;                    // gradients of the first core's slices,
  bool first_every;                // at their places in the core, or those of the nodes

  float* first_slice(int64_t node) const {
    const Level& level = index.levels[0];
    return first + (first_every ? level.digit[node] : node) * node_elements(train, 0);
  }
};

// Gradients of slices go to their places.
struct Stored {
  float* const* grads;
  bool every;

  float* place(const Backward& b, int64_t k, int64_t group) const {
    return grads[k] + b.index.place_of_group(k, group, every) * slice_elements(b.train, k);
  }
  void finish(const Backward&, int64_t, int64_t, const float*) const {}
};

// Gradients of slices go to the optimiser.
struct Stepped {
  const CoreStep* cores;

  float* place(const Backward& b, int64_t k, int64_t) const {
    static thread_local Scratch gradient;
    return gradient.at_least(slice_elements(b.train, k));
  }
  void finish(const Backward& b, int64_t k, int64_t group, const float* grad) const {
    step_row(cores[k], b.index.digit_of_group(k, group), grad);
  }
};

// dP of the prefixes before the last digit: a row's gradient times its slice, over the ids.
void last_prefixes(const Backward& b) {
  const int64_t k = b.train.cores - 1, rank = b.train.ranks[k], columns = b.train.columns[k];
  const int64_t lead = leading_columns(b.train, k - 1), width = lead * columns;
  const Level &level = b.index.levels[k], &above = b.index.levels[k - 1];
#pragma omp for schedule(dynamic, 32)
  for (int64_t node = 0; node < above.size(); ++node) {
    if (k > 1 && node + kNodesAhead < above.size()) {
      float* next = b.grads.data[k - 1] + above.slot[node + kNodesAhead] * lead * rank;
      for (int64_t e = 0; e < lead * rank; e += kLineElements) __builtin_prefetch(next + e, 1);
    }
    float* target = k == 1 ? b.first_slice(node)
                           : b.grads.data[k - 1] + above.slot[node] * lead * rank;
    const int64_t first = above.children[node], end = above.children[node + 1];
    combine_rows(lead, rank, [&](int64_t m) {
      return [&, m](const auto& visit) __attribute__((always_inline)) {
        for (int64_t child = first; child < end; ++child) {
          const float* slice = slice_of(b.train, k, level.digit[child]);
          const float* weights = b.row_grads + child * width + m * columns;
          for (int64_t j = 0; j < columns; ++j) visit(slice + j * rank, weights + j, columns);
        }
      };
    }, target);
  }
}

// The product that the node at a place of level k multiplies: nobody has read it since the read.
inline __attribute__((always_inline)) void prefetch_product(const Backward& b, int64_t k,
                                                            int64_t place) {
  const Level& level = b.index.levels[k];
  if (place >= level.size()) return;
  const float* product =
      product_of(b.train, b.index, b.products, k - 1, level.parent[level.nodes[place]]);
  for (int64_t e = 0; e < node_elements(b.train, k - 1); e += kLineElements)
    __builtin_prefetch(product + e);
}

// Slices of the last core.
template <class Sink>
void last_slices(const Backward& b, const Sink& sink) {
  const int64_t k = b.train.cores - 1, rank = b.train.ranks[k], columns = b.train.columns[k];
  const int64_t lead = leading_columns(b.train, k - 1), width = lead * columns;
  const Level& level = b.index.levels[k];
#pragma omp for schedule(dynamic, 4)
  for (int64_t g = 0; g < level.num_groups(); ++g) {
    const int64_t first = level.groups[g], end = level.groups[g + 1];
    float* target = sink.place(b, k, g);
    combine_rows(columns, rank, [&](int64_t j) {
      return [&, j](const auto& visit) __attribute__((always_inline)) {
        for (int64_t place = first; place < end; ++place) {
          prefetch_product(b, k, place + kNodesAhead);
          const int64_t node = level.nodes[place];
          const float* left = product_of(b.train, b.index, b.products, k - 1, level.parent[node]);
          const float* weights = b.row_grads + node * width + j;
          for (int64_t m = 0; m < lead; ++m) visit(left + m * rank, weights + m * columns, 1);
        }
      };
    }, target);
    sink.finish(b, k, g, target);
  }
}

// Of a level between: its slices, and what its nodes give to their parents.
template <class Sink>
void middle_level(const Backward& b, int64_t k, const Sink& sink) {
  const Level& level = b.index.levels[k];
  const int64_t inner = b.train.ranks[k], width = b.train.columns[k] * b.train.ranks[k + 1];
  const int64_t lead = leading_columns(b.train, k - 1), panel = round_up(inner, kWidth);
#pragma omp for schedule(dynamic, 4)
  for (int64_t g = 0; g < level.num_groups(); ++g) {
    static thread_local Scratch parents, turned;
    const int64_t first = level.groups[g], end = level.groups[g + 1], rows = (end - first) * lead;
    const float* grad = b.grads.data[k] + first * lead * width;
    const float* left = gather_parents(b.train, b.index, b.products, k, first, end, parents);
    float* target = sink.place(b, k, g);
    Ahead ahead = next_slice(b.train, b.index, k, g);
    multiply({left, 1, inner}, inner, rows, grad, width, width, target, width, ahead);
    float* slice = turned.at_least(width * panel);
    transpose(slice_of(b.train, k, b.index.digit_of_group(k, g)), width, inner, width, slice,
              panel);
    multiply({grad, width, 1}, rows, width, slice, panel, inner,
             b.before[k] + first * lead * inner, inner, ahead);
    sink.finish(b, k, g, target);
  }
}

// dP_(k-1): what the nodes of level k give, summed over those with the same parent.
void sum_children(const Backward& b, int64_t k) {
  const Level &level = b.index.levels[k], &above = b.index.levels[k - 1];
  const int64_t elements = node_elements(b.train, k - 1);
#pragma omp for schedule(static)
  for (int64_t node = 0; node < above.size(); ++node) {
    float* sum = k == 1 ? b.first_slice(node)
                        : b.grads.data[k - 1] + above.slot[node] * elements;
    std::fill_n(sum, elements, 0.f);
    for (int64_t child = above.children[node]; child < above.children[node + 1]; ++child) {
      const float* part = b.before[k] + level.slot[child] * elements;
      for (int64_t e = 0; e < elements; ++e) sum[e] += part[e];
    }
  }
}

template <class Sink>
void all_levels(const Backward& b, const Sink& sink) {
  const int64_t last = b.train.cores - 1;
  last_prefixes(b);
  last_slices(b, sink);
  for (int64_t k = last - 1; k > 0; --k) {
    middle_level(b, k, sink);
    sum_children(b, k);
  }
}

void step_first(const Backward& b, const CoreStep& core) {
  const Level& level = b.index.levels[0];
#pragma omp for schedule(static)
  for (int64_t node = 0; node < level.size(); ++node)
    step_row(core, level.digit[node], b.first_slice(node));
}

// Steps the slices of a core that no id meets: their gradient is zero.
void step_others(const Backward& b, int64_t k, const CoreStep& core) {
  const int64_t elements = slice_elements(b.train, k), groups = b.index.levels[k].num_groups();
  static thread_local Scratch scratch;
  float* zeros = scratch.at_least(elements);
  std::fill_n(zeros, elements, 0.f);
#pragma omp for schedule(static)
  for (int64_t g = 0; g <= groups; ++g) {
    const int64_t from = g == 0 ? 0 : b.index.digit_of_group(k, g - 1) + 1;
    const int64_t to = g == groups ? b.train.rows[k] : b.index.digit_of_group(k, g);
    for (int64_t slice = from; slice < to; ++slice) step_row(core, slice, zeros);
  }
}

// Memory that all threads of a call share, and that the calling thread keeps.
struct Shared {
  Scratch grads, before[kMaxCores], first;
};

Backward begin(const TensorTrain& train, const TrainIndex& index, const float* products,
               const float* row_grads, Shared& memory) {
  Backward b{train, index, place_products(train, index, const_cast<float*>(products)), {}, {},
             row_grads, nullptr, false};
  const int64_t last = train.cores - 1;
  b.grads = place_products(
      train, index, memory.grads.at_least(product_elements(train, index.levels[last].size())));
  for (int64_t k = 1; k < last; ++k)
    b.before[k] = memory.before[k].at_least(index.levels[k].size() * node_elements(train, k - 1));
  return b;
}

}  // namespace

void gradients(const TensorTrain& train, const TrainIndex& index, const float* products,
               const float* row_grads, bool every, float* const* core_grads, int threads) {
  static thread_local Shared memory;
  Backward b = begin(train, index, products, row_grads, memory);
  b.first = core_grads[0], b.first_every = every;
#pragma omp parallel num_threads(threads) if (threads > 1)
  all_levels(b, Stored{core_grads, every});
}

void step(const TensorTrain& train, const TrainIndex& index, const float* products,
          const float* row_grads, bool every, const CoreStep* cores, int threads) {
  static thread_local Shared memory;
  Backward b = begin(train, index, products, row_grads, memory);
  b.first = memory.first.at_least(index.levels[0].size() * node_elements(train, 0));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    all_levels(b, Stepped{cores});
    step_first(b, cores[0]);
    for (int64_t k = 0; every && k < train.cores; ++k) step_others(b, k, cores[k]);
  }
}

}  // namespace shardlab::SHARDLAB_ISA
