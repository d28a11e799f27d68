// Python face of record files: `shardlab/tiers/disk.py` is the only caller.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "bind.h"
#include "disk.h"

namespace nb = nanobind;

namespace {

using shardlab::Disk;
using shardlab::DiskFailure;
using shardlab::Job;
using shardlab::binding::Address;

// (file, address of int64 rows or 0, first row of a range, count, address of the records).
using RequestTuple = std::tuple<int, Address, int64_t, int64_t, Address>;
// (kind, file, whether a write failed, first, count, errno); see DiskFailure.
using FailureTuple = std::tuple<std::string, int, bool, int64_t, int64_t, int>;

std::optional<FailureTuple> as_tuple(const std::optional<DiskFailure>& failure) {
  static const char* const kKinds[] = {"io",  "short",     "checksum",
                                       "unwritten", "row", "lost_write"};
  if (!failure) return std::nullopt;
  return FailureTuple{kKinds[(int)failure->kind], failure->file,  failure->write,
                      failure->first,             failure->count, failure->error};
}

std::shared_ptr<Job> submit(Disk& disk, bool write, const std::vector<RequestTuple>& tuples) {
  const nb::gil_scoped_release release;
  std::vector<shardlab::Request> requests;
  requests.reserve(tuples.size());
  for (const auto& [file, rows, start, count, data] : tuples)
    requests.push_back({file, (const int64_t*)rows, start, count, (char*)data});
  return disk.submit(write, requests);
}

}  // namespace

void bind_disk(nb::module_& m) {
  using namespace shardlab;
  const auto release = nb::call_guard<nb::gil_scoped_release>();
  m.def("page_checksum", [](Address page, int64_t number, uint64_t salt) {
    return page_checksum((const char*)page, number, salt);
  });
  nb::class_<Job>(m, "DiskJob")
      .def("wait", &Job::wait, release)
      // Of a job that is done.
      .def("failure", [](const Job& job) { return as_tuple(job.failure); })
      .def("take_stale",
           [](Job& job, size_t part, Address out) { return job.take_stale(part, (uint8_t*)out); })
      .def("mark", [](Job& job, size_t part, Address marks) { job.mark(part, (uint8_t*)marks); });
  nb::class_<Disk>(m, "Disk")
      .def("__init__",
           [](Disk* self, bool allow_uring, int depth) {
             const nb::gil_scoped_release no_gil;
             new (self) Disk({allow_uring, depth});
           })
      .def("add_file", &Disk::add_file)
      .def("remove_file", &Disk::remove_file)
      .def("rows_written", &Disk::rows_written)
      .def("lost_write", [](Disk& disk, int file) { return as_tuple(disk.lost_write(file)); })
      .def("submit", &submit)
      .def("drain", &Disk::drain, release)
      .def("inject_fault", &Disk::inject_fault)
      .def("engine_name", &Disk::engine_name)
      .def("counters", [](const Disk& disk) {
        const DiskCounters& c = disk.counters();
        return std::tuple<int64_t, int64_t, int64_t, int64_t>{c.reads, c.writes, c.read_bytes,
                                                              c.written_bytes};
      });
}
