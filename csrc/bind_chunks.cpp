// Python face of pruned tables: `shardlab/ops/chunks.py` is the only caller. Addresses as in
// bind.cpp.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "bind.h"
#include "chunks.h"
#include "dispatch.h"

namespace nb = nanobind;
using namespace shardlab;
using shardlab::binding::Address;
using shardlab::binding::at;
using shardlab::binding::step_from;

namespace {

// (stores, blocks, number of blocks)
using CallTuple = std::tuple<Address, Address, int64_t>;
ChunkCall call_from(const CallTuple& t) {
  return {at<ChunkStore>(std::get<0>(t)), at<ChunkBlock>(std::get<1>(t)), std::get<2>(t)};
}

// (segments, number of them, ids, norms, stride, weights, thresholds, key, margins, evicted)
using OfferTuple =
    std::tuple<Address, int64_t, Address, Address, int64_t, Address, Address, int64_t, Address,
               Address>;
ChunkOffers offers_from(const OfferTuple& t) {
  return {at<ChunkSegment>(std::get<0>(t)), std::get<1>(t), at<int64_t>(std::get<2>(t)),
          at<float>(std::get<3>(t)), std::get<4>(t), at<float>(std::get<5>(t)),
          at<float>(std::get<6>(t)),
          (uint64_t)std::get<7>(t),
          at<float>(std::get<8>(t)),
          at<int64_t>(std::get<9>(t)), nullptr};
}

// (rows, stride, count, which is added to); rows of 0: no log.
using LogTuple = std::tuple<Address, int64_t, Address>;
// A log for a call, and its count back to the caller.
class Log {
 public:
  explicit Log(const LogTuple& t) : count_(at<int64_t>(std::get<2>(t))) {
    if (std::get<0>(t)) log_ = {at<int64_t>(std::get<0>(t)), std::get<1>(t), *count_};
  }
  ~Log() {
    if (log_.rows) *count_ = log_.count;
  }
  ChunkLog* get() { return log_.rows ? &log_ : nullptr; }

 private:
  ChunkLog log_{};
  int64_t* count_;
};

using DecisionsTuple = std::tuple<Address, Address, Address, int64_t>;
ChunkDecisions decisions_from(const DecisionsTuple& t) {
  return {at<float>(std::get<0>(t)), at<float>(std::get<1>(t)), at<int64_t>(std::get<2>(t)),
          std::get<3>(t)};
}

void bind_index(nb::module_& m) {
  m.def("chunk_held_bytes", [](Address store) { return chunk_held_bytes(*at<ChunkStore>(store)); });
  m.def("chunk_find", [](const CallTuple& call, Address segments, int64_t count, Address ids,
                         Address slots, int threads) {
    nb::gil_scoped_release release;
    chunk_find(call_from(call), at<ChunkSegment>(segments), count, at<int64_t>(ids),
               at<int64_t>(slots), threads);
  });
  m.def("chunk_places", [](const CallTuple& call, Address segments, int64_t count, Address ids,
                           int64_t stride, Address places, int threads) {
    nb::gil_scoped_release release;
    chunk_places(call_from(call), at<ChunkSegment>(segments), count, at<int64_t>(ids), stride,
                 at<int64_t>(places), threads);
  });
  m.def("chunk_touch", [](const CallTuple& call, const OfferTuple& offers, int threads) {
    nb::gil_scoped_release release;
    chunk_touch(call_from(call), offers_from(offers), threads);
  });
  m.def("chunk_offer", [](const CallTuple& call, const OfferTuple& offers, Address admitted,
                          const LogTuple& log_tuple) {
    nb::gil_scoped_release release;
    Log log(log_tuple);
    ChunkOffers in = offers_from(offers);
    in.log = log.get();
    return chunk_offer(call_from(call), in, at<int64_t>(admitted));
  });
  m.def("chunk_count", [](const CallTuple& call, int64_t store,
                          const std::tuple<int64_t, int64_t>& slice, float decay, Address bins,
                          Address dims, int64_t stride) {
    nb::gil_scoped_release release;
    chunk_count(call_from(call), store, {std::get<0>(slice), std::get<1>(slice)}, decay,
                at<int64_t>(bins), at<int64_t>(dims), stride);
  });
  m.def("chunk_decide", [](const CallTuple& call, int64_t store, float decay, Address thresholds,
                           int64_t key, Address evicted, const LogTuple& log_tuple) {
    nb::gil_scoped_release release;
    Log log(log_tuple);
    chunk_decide(call_from(call), store, decay, at<float>(thresholds), (uint64_t)key,
                 at<int64_t>(evicted), log.get());
  });
  m.def("chunk_compact", [](Address store, bool tight, Address moves) {
    nb::gil_scoped_release release;
    return chunk_compact(*at<ChunkStore>(store), tight, at<int64_t>(moves));
  });
  m.def("chunk_load", [](Address store, Address keys, Address values, int64_t n) {
    nb::gil_scoped_release release;
    chunk_load(*at<ChunkStore>(store), at<uint64_t>(keys), at<char>(values), n);
  });
  m.def("chunk_insert", [](const CallTuple& call, int64_t block, Address rows, int64_t n,
                           Address places, Address utilities) {
    nb::gil_scoped_release release;
    chunk_insert(call_from(call), block, at<int64_t>(rows), n, at<int32_t>(places),
                 at<uint16_t>(utilities));
  });
  m.def("chunk_list", [](const CallTuple& call, int64_t block, Address rows, Address values) {
    nb::gil_scoped_release release;
    return chunk_list(call_from(call), block, at<int64_t>(rows), at<char>(values));
  });
}

// What readers of rows ask, beside the index or away from it.
void bind_index_rows(nb::module_& m) {
  m.def("chunk_get", [](const CallTuple& call, int64_t block, Address rows, int64_t n,
                        Address places, Address utilities) {
    nb::gil_scoped_release release;
    chunk_get(call_from(call), block, at<int64_t>(rows), n, at<int32_t>(places),
              at<uint16_t>(utilities));
  });
  // (block, low, high, slice, slices, marks)
  m.def("chunk_between", [](const CallTuple& call, int64_t store, const std::vector<int64_t>& r,
                            Address found) {
    if (r.size() != 6) throw nb::value_error("a range needs 6 numbers");
    nb::gil_scoped_release release;
    return chunk_between(call_from(call), store, {r[0], r[1], r[2], r[3], r[4], (Marks)r[5]},
                         at<int64_t>(found));
  });
  // (decays, thresholds, keys, count); (first chunk, chunks of a row of the table, key of the table)
  m.def("chunk_redecide", [](const DecisionsTuple& decisions, const std::vector<int64_t>& grid,
                             Address rows, int64_t n, int64_t chunks, Address utilities,
                             int threads) {
    if (grid.size() != 3) throw nb::value_error("a grid needs 3 numbers");
    nb::gil_scoped_release release;
    chunk_redecide({0, 0, grid[0], grid[1], grid[2]}, decisions_from(decisions), at<int64_t>(rows),
                   n, chunks, at<int16_t>(utilities), threads);
  });
  m.def("chunk_redecay", [](const DecisionsTuple& decisions, int64_t n, Address cells,
                            int threads) {
    nb::gil_scoped_release release;
    chunk_redecay(decisions_from(decisions), n, at<uint8_t>(cells), threads);
  });
  m.def("chunk_unmark", [](Address store) {
    nb::gil_scoped_release release;
    chunk_unmark(*at<ChunkStore>(store));
  });
}

// (bytes, blocks, encodings, number of blocks)
using ArenaTuple = std::tuple<Address, Address, Address, int64_t>;
Arena arena_from(const ArenaTuple& t) {
  return {at<char>(std::get<0>(t)), at<Block>(std::get<1>(t)), at<Encoding>(std::get<2>(t)),
          std::get<3>(t)};
}

// (ids, splits, starts, sources, weights, grads, row_squares)
Updates updates_from(const std::vector<Address>& v, int64_t key) {
  if (v.size() != 7) throw nb::value_error("an update needs 7 tensors");
  return {at<int64_t>(v[0]), at<int64_t>(v[1]),
          {at<int64_t>(v[2]), at<int64_t>(v[3]), at<float>(v[4])},
          at<float>(v[5]), at<float>(v[6]), (uint64_t)key, nullptr};
}

// (weights, key, norms, stride, absent, absent stride, slots, shares)
using GainTuple =
    std::tuple<Address, int64_t, Address, int64_t, Address, int64_t, Address, Address>;
ChunkGains gains_from(const GainTuple& t) {
  return {at<float>(std::get<0>(t)), (uint64_t)std::get<1>(t), at<float>(std::get<2>(t)),
          std::get<3>(t), at<float>(std::get<4>(t)), std::get<5>(t), at<int64_t>(std::get<6>(t)),
          at<float>(std::get<7>(t))};
}

}  // namespace

void bind_chunks(nb::module_& m) {
  bind_index(m);
  bind_index_rows(m);
  m.def("chunk_read", [](const CallTuple& call, const ArenaTuple& arena, Address reads,
                         int64_t count, int64_t width, Address ids,
                         const std::vector<Address>& entries, Address out, int threads) {
    nb::gil_scoped_release release;
    Csr csr{};
    if (entries.size() == 4)
      csr = {at<int64_t>(entries[0]), at<int64_t>(entries[1]), at<float>(entries[2])};
    active_kernels().chunks->read(call_from(call), arena_from(arena),
                                  {at<int64_t>(reads), count, width}, at<int64_t>(ids),
                                  entries.empty() ? nullptr : &csr,
                                  entries.empty() ? nullptr : at<int64_t>(entries[3]),
                                  at<float>(out), threads);
  });
  m.def("chunk_update", [](const CallTuple& call, const ArenaTuple& arena,
                           const std::vector<Address>& v, int64_t key, int64_t rule,
                           const std::vector<float>& n, const GainTuple& gains, int threads) {
    const Updates updates = updates_from(v, key);
    const Step step = step_from(n);
    nb::gil_scoped_release release;
    active_kernels().chunks->update(call_from(call), arena_from(arena), updates, (Rule)rule, step,
                                    gains_from(gains), threads);
  });
  m.def("chunk_admit", [](const CallTuple& call, const ArenaTuple& arena,
                          const std::vector<Address>& v, int64_t key, int64_t rule,
                          const std::vector<float>& n, Address admitted, int64_t count,
                          Address written, int threads) {
    const Updates updates = updates_from(v, key);
    const Step step = step_from(n);
    nb::gil_scoped_release release;
    active_kernels().chunks->admit(call_from(call), arena_from(arena), updates, (Rule)rule, step,
                                   {at<AdmittedChunk>(admitted), count, at<bool>(written)}, threads);
  });
}
