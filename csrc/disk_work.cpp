// The disk's thread: starts runs of pages in the order of their jobs, as many at a time as the queue
// is deep, and works off what the device completes. A run that is to be written in part is read,
// patched and written while its slot holds on to it.
#include <algorithm>
#include <cerrno>
#include <cstring>

#include "disk.h"

namespace shardlab {
namespace {

// Completions to wait for at a time, as a share of those in flight: fewer calls into the kernel,
// and still a queue that never runs dry.
constexpr int kReapShare = 4;

}  // namespace

void Disk::work() {
  std::vector<Completion> completions;
  for (;;) {
    start_operations();
    const int in_flight = options_.depth - (int)free_.size();
    if (in_flight == 0) {
      std::unique_lock lock(queue_mutex_);
      if (queue_.empty() && stop_) break;
      wake_.wait(lock, [&] { return stop_ || !queue_.empty(); });
      continue;
    }
    completions.clear();
    engine_->reap(std::max(1, in_flight / kReapShare), completions);
    for (const Completion& completion : completions) complete(completion);
  }
}

void Disk::start_operations() {
  while (!free_.empty() && ready_run()) {
    const Part& part = head_->parts[head_part_];
    if (conflicts(part, head_run_, head_->write)) return;  // later jobs wait too: order is all
    const int slot = free_.back();
    free_.pop_back();
    operations_[slot] = {head_, &part, head_run_, Stage::kRead, 0};
    ++head_->pending;
    head_entry_ = head_run_.end;
    head_run_ready_ = false;
    start(slot);
  }
}

// Finds the next run to start; false when there is no job left.
bool Disk::ready_run() {
  if (head_run_ready_ && !head_->failure) return true;
  for (;;) {
    if (head_ == nullptr) {
      const std::lock_guard lock(queue_mutex_);
      if (queue_.empty()) return false;
      head_ = std::move(queue_.front());
      queue_.pop_front();
      head_part_ = 0;
      head_entry_ = 0;
    }
    Job& job = *head_;
    while (head_part_ < job.parts.size() && head_entry_ == job.parts[head_part_].count) {
      ++head_part_;
      head_entry_ = 0;
    }
    if (job.failure || head_part_ == job.parts.size()) {
      job.issued = true;
      maybe_finish(head_);
      head_ = nullptr;
      head_run_ready_ = false;
      continue;
    }
    const Part& part = job.parts[head_part_];
    if (part.file->has_lost) {
      fail_job(job, {FailureKind::kLostWrite, part.file->id, job.write, 0, 0, 0});
      continue;
    }
    head_run_ = next_run(part, head_entry_, job.write);
    head_run_ready_ = true;
    return true;
  }
}

bool Disk::conflicts(const Part& part, const Run& run, bool write) const {
  if ((int)free_.size() == options_.depth) return false;
  return std::any_of(operations_.begin(), operations_.end(), [&](const Operation& other) {
    return other.job != nullptr && (write || other.job->write) && other.part->file == part.file &&
           other.run.first_page < run.first_page + run.pages &&
           run.first_page < other.run.first_page + other.run.pages;
  });
}

void Disk::start(int slot) {
  Operation& op = operations_[slot];
  if (op.job->write) op.stage = op.run.read_units != 0 ? Stage::kReadToWrite : Stage::kWrite;
  if (op.stage == Stage::kWrite && !fill(slot)) return;
  ask(slot);
}

// Hands the rest of the run to the device.
void Disk::ask(int slot) {
  const Operation& op = operations_[slot];
  const bool write = op.stage == Stage::kWrite;
  const int64_t bytes = op.run.pages * kPageBytes - op.moved;
  ++(write ? counters_.writes : counters_.reads);
  (write ? counters_.written_bytes : counters_.read_bytes) += bytes;
  engine_->submit({op.part->file->fd, write, slot, buffer(slot) + op.moved, bytes,
                   op.run.first_page * kPageBytes + op.moved});
}

void Disk::complete(const Completion& completion) {
  const int slot = completion.slot;
  Operation& op = operations_[slot];
  const int64_t result = faulty(op.stage == Stage::kWrite, completion.result);
  if (result == -EINTR || result == -EAGAIN) return ask(slot);
  if (result < 0) return fail(slot, FailureKind::kIo, op.run.first_page, op.run.pages, -(int)result);
  op.moved += result;
  if (op.moved == op.run.pages * kPageBytes) return advance(slot);
  // Less than asked for: a signal may do that, and then the rest comes. The end of a file that was
  // cut short is a piece of a page, or nothing.
  if (result > 0 && op.moved % kPageBytes == 0) return ask(slot);
  fail(slot, FailureKind::kShort, op.run.first_page + op.moved / kPageBytes, 1, 0);
}

void Disk::advance(int slot) {
  Operation& op = operations_[slot];
  switch (op.stage) {
    case Stage::kRead:
      if (!deliver(slot)) return;
      break;
    case Stage::kReadToWrite:
      if (!fill(slot)) return;
      op.stage = Stage::kWrite;
      op.moved = 0;
      return ask(slot);
    case Stage::kWrite:
      break;
  }
  release(slot);
}

char* Disk::unit_at(int slot, int64_t unit) {
  const Operation& op = operations_[slot];
  return buffer(slot) + (op.part->file->layout.first_page(unit) - op.run.first_page) * kPageBytes;
}

bool Disk::verify(int slot, int64_t unit) {
  const Operation& op = operations_[slot];
  const RecordFile& file = *op.part->file;
  if (!file.checksums) return true;
  const int64_t first = file.layout.first_page(unit);
  const char* pages = unit_at(slot, unit);
  const int64_t broken = find_broken_page(pages, first, file.layout.pages, file.salt);
  if (broken < 0) return true;
  uint64_t trailer;
  std::memcpy(&trailer, pages + (broken - first) * kPageBytes + kPayloadBytes, kTrailerBytes);
  fail(slot, trailer == 0 ? FailureKind::kUnwritten : FailureKind::kChecksum, broken, 1, 0);
  return false;
}

// Copies the records of a run that was read to the caller.
bool Disk::deliver(int slot) {
  const Operation& op = operations_[slot];
  const PageLayout& layout = op.part->file->layout;
  int64_t unit = -1;
  for (int64_t e = op.run.begin; e < op.run.end; ++e) {
    const int64_t row = op.part->row(e);
    if (unit < 0 || row >= (unit + 1) * layout.records) {
      unit = layout.unit_of(row);
      if (!verify(slot, unit)) return false;
    }
    copy_out(layout, unit_at(slot, unit), row - unit * layout.records, op.part->record(e));
  }
  return true;
}

// Puts the caller's records into the run's pages, which hold the old ones where these stay.
bool Disk::fill(int slot) {
  const Operation& op = operations_[slot];
  const RecordFile& file = *op.part->file;
  const PageLayout& layout = file.layout;
  const int64_t first = layout.unit_of(op.part->row(op.run.begin));
  const int64_t units = op.run.pages / layout.pages;
  for (int64_t u = 0; u < units; ++u) {
    if (op.run.read_units >> u & 1) {
      if (!verify(slot, first + u)) return false;
    } else {
      std::memset(unit_at(slot, first + u), 0, layout.pages * kPageBytes);
    }
  }
  for (int64_t e = op.run.begin; e < op.run.end; ++e) {
    const int64_t row = op.part->row(e), unit = layout.unit_of(row);
    copy_in(layout, unit_at(slot, unit), row - unit * layout.records, op.part->record(e));
  }
  if (file.checksums)
    for (int64_t u = 0; u < units; ++u)
      seal_unit(unit_at(slot, first + u), layout.first_page(first + u), layout.pages, file.salt);
  return true;
}

void Disk::fail(int slot, FailureKind kind, int64_t page, int64_t pages, int error) {
  const Operation& op = operations_[slot];
  fail_job(*op.job, {kind, op.part->file->id, op.stage == Stage::kWrite, page, pages, error});
  release(slot);
}

// A write that fails may have lost records of every file of its job: none of these files is read or
// written again, so that the loss cannot pass unseen.
void Disk::fail_job(Job& job, const DiskFailure& failure) {
  if (!job.failure) job.failure = failure;
  if (!job.write) return;
  const std::lock_guard lock(queue_mutex_);
  for (const Part& part : job.parts) {
    if (!part.file->lost) part.file->lost = failure;
    part.file->has_lost = true;
  }
}

void Disk::release(int slot) {
  const std::shared_ptr<Job> job = std::move(operations_[slot].job);
  operations_[slot].job = nullptr;
  free_.push_back(slot);
  --job->pending;
  maybe_finish(job);
}

void Disk::maybe_finish(const std::shared_ptr<Job>& job) {
  if (!job->issued || job->pending > 0) return;
  job->finish();
  const std::lock_guard lock(queue_mutex_);
  if (--unfinished_ == 0) idle_.notify_all();
}

}  // namespace shardlab
