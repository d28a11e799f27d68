// The disk's side of callers: files, submissions, and the thread's start and end. What the thread
// does with a submission is in disk_work.cpp.
#include "disk.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <stdexcept>

namespace shardlab {
namespace {

constexpr int kMaxDepth = 4096;  // the disk's thread looks at all requests in flight for conflicts
constexpr int kMaxThreads = 32;

}  // namespace

Disk::Disk(const DiskOptions& options) : options_(options) {
  if (options.depth < 1 || options.depth > kMaxDepth)
    throw std::invalid_argument("queue depth out of range");
  const int64_t bytes = options.depth * kRequestBytes;
  buffers_ = (char*)std::aligned_alloc(kPageBytes, bytes);
  if (buffers_ == nullptr) throw std::bad_alloc();
  operations_.resize(options.depth);
  for (int slot = options.depth - 1; slot >= 0; --slot) free_.push_back(slot);
  std::string why_not = "switched off";
  if (options.allow_uring) engine_ = make_uring(options.depth, {buffers_, bytes}, why_not);
  if (engine_ != nullptr) {
    engine_name_ = "io_uring";
  } else {
    const int threads = std::min(options.depth, kMaxThreads);
    engine_name_ = std::to_string(threads) + " threads (io_uring: " + why_not + ")";
    engine_ = make_threads(threads);
  }
  thread_ = std::thread([this] { work(); });
}

Disk::~Disk() {
  {
    const std::lock_guard lock(queue_mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  thread_.join();
  engine_.reset();
  std::free(buffers_);
}

int Disk::add_file(int fd, int64_t rows, int64_t record_bytes, uint64_t salt, bool checksums,
                   int64_t written) {
  const PageLayout layout = page_layout(record_bytes);
  if (record_bytes < 1 || layout.pages > kRequestPages || rows < 0 || written < 0 ||
      written > rows)
    throw std::invalid_argument("record size or rows out of range");
  const std::lock_guard lock(order_);
  files_[next_file_].reset(
      new RecordFile{next_file_, fd, layout, rows, salt, checksums, written});
  return next_file_++;
}

void Disk::remove_file(int file) {
  const std::lock_guard lock(order_);
  files_.erase(file);
}

int64_t Disk::rows_written(int file) {
  const std::lock_guard lock(order_);
  return files_.at(file)->written;
}

std::optional<DiskFailure> Disk::lost_write(int file) {
  const std::lock_guard lock(order_);
  const std::lock_guard queue_lock(queue_mutex_);
  return files_.at(file)->lost;
}

std::shared_ptr<Job> Disk::submit(bool write, const std::vector<Request>& requests) {
  std::vector<Part> parts;
  std::optional<DiskFailure> refusal;
  for (const Request& request : requests) {
    Part part{nullptr, request.data, request.count, request.start};
    const int64_t negative = request.rows == nullptr ? 0 : take_rows(part, request.rows);
    if (negative < 0 && !refusal)
      refusal = DiskFailure{FailureKind::kRow, request.file, write, negative, 0, 0};
    parts.push_back(std::move(part));
  }
  const std::lock_guard lock(order_);
  for (size_t i = 0; i < parts.size(); ++i) parts[i].file = files_.at(requests[i].file);
  if (!refusal) refusal = admit(write, parts);
  auto job = std::make_shared<Job>(write, std::move(parts));
  if (refusal) {
    job->failure = refusal;
    job->finish();
    return job;
  }
  std::erase_if(readers_, [](const auto& reader) { return reader.expired(); });
  if (write) {
    for (const auto& reader : readers_)
      if (const auto read = reader.lock()) read->mark_written(*job);
  } else {
    readers_.push_back(job);
  }
  const std::lock_guard queue_lock(queue_mutex_);
  queue_.push_back(job);
  ++unfinished_;
  wake_.notify_one();
  return job;
}

std::optional<DiskFailure> Disk::admit(bool write, std::vector<Part>& parts) {
  std::unordered_map<RecordFile*, int64_t> written;
  for (Part& part : parts) {
    RecordFile& file = *part.file;
    if (file.has_lost) return DiskFailure{FailureKind::kLostWrite, file.id, write, 0, 0, 0};
    part.written = written.try_emplace(&file, file.written).first->second;
    if (part.count == 0) continue;
    const auto refuse = [&](int64_t row) {
      return DiskFailure{FailureKind::kRow, file.id, write, row, part.written, 0};
    };
    const int64_t first = part.row(0), last = part.row(part.count - 1);
    const bool range = part.rows.empty();
    if (first < 0) return refuse(first);
    if (write && range) {  // a range may go on where the rows given so far end
      if (first > part.written) return refuse(first);
      if (last >= file.rows) return refuse(last);
      written[&file] = std::max(part.written, last + 1);
    } else if (last >= part.written) {
      return refuse(last);
    }
  }
  for (const auto& [file, rows] : written) file->written = rows;
  return std::nullopt;
}

bool Disk::drain(double seconds) {
  std::unique_lock lock(queue_mutex_);
  return idle_.wait_for(lock, std::chrono::duration<double>(seconds),
                        [&] { return unfinished_ == 0; });
}

void Disk::inject_fault(bool write, int64_t result, int64_t skip) {
  const std::lock_guard lock(fault_mutex_);
  fault_write_ = write;
  fault_result_ = result;
  fault_skip_ = skip;
  fault_armed_ = true;
}

int64_t Disk::faulty(bool write, int64_t result) {
  if (!fault_armed_) return result;
  const std::lock_guard lock(fault_mutex_);
  if (write != fault_write_ || fault_skip_-- > 0) return result;
  fault_armed_ = false;
  return fault_result_;
}

}  // namespace shardlab
