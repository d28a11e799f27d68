// Python face of the row kernels and of the codecs; addresses as in bind.cpp.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include "bind.h"
#include "dispatch.h"

namespace nb = nanobind;
using namespace shardlab;
using shardlab::binding::Address;
using shardlab::binding::at;
using shardlab::binding::step_from;

namespace {

// (codec, rows, columns, elements between rows of values, bytes between records)
RowCodes codes_from(const std::vector<int64_t>& v) {
  if (v.size() != 5) throw nb::value_error("a matrix of codes needs 5 numbers");
  return {(Codec)v[0], v[1], v[2], v[3], v[4]};
}

// (ids, splits, starts, sources, weights, grads, row_squares)
Updates updates_from(const std::vector<Address>& v, int64_t key, Address row_ids) {
  if (v.size() != 7) throw nb::value_error("an update needs 7 addresses");
  const Csr csr{at<int64_t>(v[2]), at<int64_t>(v[3]), at<float>(v[4])};
  return {at<int64_t>(v[0]), at<int64_t>(v[1]), csr, at<float>(v[5]), at<float>(v[6]),
          (uint64_t)key, at<int64_t>(row_ids)};
}

// (arena, blocks, encodings, places)
MoveEnd end_from(const std::vector<Address>& v) {
  if (v.size() != 4) throw nb::value_error("an end of a move needs 4 addresses");
  return {{at<char>(v[0]), at<Block>(v[1]), at<Encoding>(v[2]), 0}, at<int64_t>(v[3])};
}

void bind_fp32(nb::module_& m) {
  m.def("gather", [](Address arena, Address blocks, Address segments, int64_t num_segments,
                     Address ids, Address out, int threads) {
    nb::gil_scoped_release release;
    active_kernels().rows->gather({at<char>(arena), at<Block>(blocks), nullptr, 0},
                                  at<GatherSegment>(segments), num_segments, at<int64_t>(ids),
                                  at<float>(out), threads);
  });
  m.def("pool", [](Address source, Address jobs, int64_t num_jobs, Address index, Address offsets,
                   Address weights, Address out, int threads) {
    nb::gil_scoped_release release;
    active_kernels().rows->pool(at<float>(source), at<PoolJob>(jobs), num_jobs, at<int64_t>(index),
                                at<int64_t>(offsets), at<float>(weights), at<float>(out), threads);
  });
  m.def("sum", [](Address source, Address starts, Address sources, Address weights, Address pieces,
                  int64_t num_pieces, float scale, Address out, int threads) {
    nb::gil_scoped_release release;
    const Csr csr{at<int64_t>(starts), at<int64_t>(sources), at<float>(weights)};
    active_kernels().rows->sum(at<float>(source), csr, at<SumPiece>(pieces), num_pieces, scale,
                               at<float>(out), threads);
  });
  m.def("update", [](Address arena, Address blocks, int64_t num_blocks, Address ids,
                     Address splits, Address starts, Address sources, Address weights,
                     Address grads, Address row_squares, int64_t rule,
                     const std::vector<float>& step, int threads) {
    const Step s = step_from(step);
    const Updates updates =
        updates_from({ids, splits, starts, sources, weights, grads, row_squares}, 0, 0);
    nb::gil_scoped_release release;
    active_kernels().rows->update({at<char>(arena), at<Block>(blocks), nullptr, num_blocks},
                                  updates, (Rule)rule, s, threads);
  });
}

void bind_encoded(nb::module_& m) {
  m.def("gather_encoded", [](Address arena, Address blocks, Address encodings, Address segments,
                             int64_t num_segments, Address ids, Address out, int threads) {
    nb::gil_scoped_release release;
    active_kernels().rows->gather({at<char>(arena), at<Block>(blocks), at<Encoding>(encodings), 0},
                                  at<GatherSegment>(segments), num_segments, at<int64_t>(ids),
                                  at<float>(out), threads);
  });
  m.def("pool_encoded", [](Address arena, Address jobs, int64_t num_jobs, Address index,
                           Address offsets, Address weights, Address out, int threads) {
    nb::gil_scoped_release release;
    active_kernels().rows->pool_encoded(at<char>(arena), at<EncodedPoolJob>(jobs), num_jobs,
                                        at<int64_t>(index), at<int64_t>(offsets),
                                        at<float>(weights), at<float>(out), threads);
  });
  m.def("update_encoded", [](const std::vector<Address>& arena, int64_t num_blocks,
                             const std::vector<Address>& updates, int64_t rule,
                             const std::vector<float>& step, int64_t key, Address row_ids,
                             int threads) {
    const Step s = step_from(step);
    const Updates what = updates_from(updates, key, row_ids);
    if (arena.size() != 3) throw nb::value_error("an encoded arena needs 3 addresses");
    nb::gil_scoped_release release;
    const Arena where{at<char>(arena[0]), at<Block>(arena[1]), at<Encoding>(arena[2]), num_blocks};
    active_kernels().rows->update(where, what, (Rule)rule, s, threads);
  });
}

}  // namespace

void bind_rows(nb::module_& m) {
  bind_fp32(m);
  bind_encoded(m);
  m.def("encode_rows", [](const std::vector<int64_t>& shape, Address values, Address records,
                          bool stochastic, int64_t key, int64_t first_row, int64_t first_column,
                          Address row_ids, int threads) {
    const RowCodes codes = codes_from(shape);
    nb::gil_scoped_release release;
    const Rounding rounding{stochastic, (uint64_t)key, first_row, first_column,
                            at<int64_t>(row_ids)};
    active_kernels().codecs->encode(codes, at<float>(values), at<char>(records), rounding, threads);
  });
  m.def("decode_rows", [](const std::vector<int64_t>& shape, Address records, Address values,
                          int threads) {
    const RowCodes codes = codes_from(shape);
    nb::gil_scoped_release release;
    active_kernels().codecs->decode(codes, at<char>(records), at<float>(values), threads);
  });
  m.def("encode_spans", [](const std::vector<int64_t>& shape, Address values, Address records,
                           bool stochastic, int64_t key, int64_t first_span, int threads) {
    const Spans spans{(Codec)shape.at(0), shape.at(1), (int32_t)shape.at(2)};
    nb::gil_scoped_release release;
    active_kernels().spans->encode(spans, at<float>(values), at<char>(records),
                                   {stochastic, (uint64_t)key, first_span, 0, nullptr}, threads);
  });
  m.def("decode_spans", [](const std::vector<int64_t>& shape, Address records, Address values,
                           float factor, bool add, int threads) {
    const Spans spans{(Codec)shape.at(0), shape.at(1), 0};
    nb::gil_scoped_release release;
    active_kernels().spans->decode(spans, at<char>(records), at<float>(values), factor, add,
                                   threads);
  });
  m.def("sum_pieces", [](Address parts, int64_t ranks, int64_t rank, int64_t count, float scale,
                         Address own) {
    nb::gil_scoped_release release;
    active_kernels().spans->sum(at<float>(parts), ranks, rank, count, scale, at<float>(own));
  });
  m.def("move_rows", [](const std::vector<Address>& source, const std::vector<Address>& target,
                        Address segments, int64_t num_segments, int64_t key, Address row_ids,
                        int threads) {
    const MoveEnd from = end_from(source), to = end_from(target);
    nb::gil_scoped_release release;
    active_kernels().codecs->move(from, to, at<MoveSegment>(segments), num_segments, (uint64_t)key,
                                  at<int64_t>(row_ids), threads);
  });
}
