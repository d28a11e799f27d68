// Record files on a block device: a thread of its own keeps the device's queue full with page reads
// and writes, checks them, and moves records between pages and the caller's memory.
#pragma once
#include <deque>
#include <memory>
#include <string>
#include <thread>
#include <unordered_map>

#include "disk_engine.h"
#include "disk_job.h"

namespace shardlab {

struct DiskOptions {
  bool allow_uring;
  int depth;  // requests in flight
};

// One part of a submission: `count` rows of a file, listed, or a range from `start` on (rows null).
struct Request {
  int file;
  const int64_t* rows;
  int64_t start;
  int64_t count;
  char* data;
};

struct DiskCounters {
  std::atomic<int64_t> reads, writes;  // requests to the device
  std::atomic<int64_t> read_bytes, written_bytes;
};

// Jobs take effect in the order of their submission: a request that touches a page on which an
// earlier one is still at work waits for it, all others overlap. A read therefore returns exactly
// the writes that were submitted before it.
class Disk {
 public:
  explicit Disk(const DiskOptions& options);
  ~Disk();

  int add_file(int fd, int64_t rows, int64_t record_bytes, uint64_t salt, bool checksums,
               int64_t written);
  // No job may touch the file any more.
  void remove_file(int file);
  int64_t rows_written(int file);
  // The failure of a write to this file, after which it refuses all jobs.
  std::optional<DiskFailure> lost_write(int file);

  // A refused submission comes back done, with its failure, and has changed nothing. The memory of
  // the requests must stay where it is until the job is done.
  std::shared_ptr<Job> submit(bool write, const std::vector<Request>& requests);
  // Waits at most so long for all jobs; returns whether all are done.
  bool drain(double seconds);

  // Tests only: after `skip` more device requests of this kind, the next one reports `result`
  // (-errno, or fewer bytes than it moved).
  void inject_fault(bool write, int64_t result, int64_t skip);

  const std::string& engine_name() const { return engine_name_; }
  const DiskCounters& counters() const { return counters_; }

 private:
  enum class Stage { kRead, kReadToWrite, kWrite };
  struct Operation {
    std::shared_ptr<Job> job;  // null: the slot is free
    const Part* part;
    Run run;
    Stage stage;
    int64_t moved;
  };

  // Refuses rows that the file does not have; sets what the parts see of it.
  std::optional<DiskFailure> admit(bool write, std::vector<Part>& parts);
  void work();
  void start_operations();
  bool ready_run();
  bool conflicts(const Part& part, const Run& run, bool write) const;
  void start(int slot);
  void ask(int slot);
  void complete(const Completion& completion);
  void advance(int slot);
  void fail(int slot, FailureKind kind, int64_t page, int64_t pages, int error);
  void fail_job(Job& job, const DiskFailure& failure);
  bool verify(int slot, int64_t unit);
  bool deliver(int slot);
  bool fill(int slot);
  void release(int slot);
  void maybe_finish(const std::shared_ptr<Job>& job);
  int64_t faulty(bool write, int64_t result);
  char* buffer(int slot) { return buffers_ + slot * kRequestBytes; }
  char* unit_at(int slot, int64_t unit);

  const DiskOptions options_;
  std::string engine_name_;
  DiskCounters counters_{};
  char* buffers_ = nullptr;

  std::mutex order_;  // submissions, one at a time: the order that jobs take effect in
  std::unordered_map<int, std::shared_ptr<RecordFile>> files_;
  std::vector<std::weak_ptr<Job>> readers_;  // read jobs that somebody still holds
  int next_file_ = 0;

  std::mutex queue_mutex_;
  std::condition_variable wake_, idle_;
  std::deque<std::shared_ptr<Job>> queue_;
  int unfinished_ = 0;
  bool stop_ = false;

  // The disk's thread only, once it runs.
  std::unique_ptr<Engine> engine_;
  std::vector<Operation> operations_;
  std::vector<int> free_;
  std::shared_ptr<Job> head_;  // the job that runs are being started of
  size_t head_part_ = 0;
  int64_t head_entry_ = 0;
  Run head_run_{};
  bool head_run_ready_ = false;

  std::mutex fault_mutex_;
  std::atomic<bool> fault_armed_ = false;
  bool fault_write_ = false;
  int64_t fault_result_ = 0, fault_skip_ = 0;

  std::thread thread_;  // last: it uses all of the above
};

}  // namespace shardlab
