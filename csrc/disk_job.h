// What a job on record files is: rows of several files, sorted, and cut into runs of pages.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "disk_page.h"

namespace shardlab {

enum class FailureKind { kIo, kShort, kChecksum, kUnwritten, kRow, kLostWrite };

// The first thing that went wrong in a job. `first` and `count` are pages; for kRow the row that was
// asked for and the number of rows that the file has been given so far.
struct DiskFailure {
  FailureKind kind;
  int file;
  bool write;
  int64_t first;
  int64_t count;
  int error;  // errno
};

struct RecordFile {
  int id;
  int fd;
  PageLayout layout;
  int64_t rows;
  uint64_t salt;
  bool checksums;
  int64_t written;  // rows from the first on that have been given; guarded by Disk::order_
  std::optional<DiskFailure> lost{};    // a write that failed; guarded by Disk::queue_mutex_
  std::atomic<bool> has_lost = false;
};

// Rows of one file and the records they are read into or written from. Entry e is the e-th row in
// ascending order (equal rows in the caller's order); `position` is its place with the caller.
struct Part {
  std::shared_ptr<RecordFile> file;
  char* data;
  int64_t count;
  int64_t start = 0;               // a range of rows from here on, where `rows` is empty
  std::vector<int64_t> rows{};
  std::vector<int64_t> positions{};  // empty: entry e is the caller's e
  int64_t written = 0;             // of the file, when the job came
  std::vector<uint8_t> stale{};    // by position; empty until the first mark

  int64_t row(int64_t e) const { return rows.empty() ? start + e : rows[e]; }
  char* record(int64_t e) const {
    return data + (positions.empty() ? e : positions[e]) * file->layout.record_bytes;
  }
};

// Takes the caller's rows: sorts them unless they come sorted. Returns a row below 0, if there is
// one, else 0.
int64_t take_rows(Part& part, const int64_t* rows);
// Marks the records of `read` whose rows `written` contains. Returns whether there were any.
bool mark_stale(Part& read, const Part& written);

// Pages of the largest request: MAX_RECORD_PAGES of shardlab/pages.py. Larger ones were slower here,
// for random rows by up to a half and for whole tables too.
constexpr int64_t kRequestPages = 16;
constexpr int64_t kRequestBytes = kRequestPages * kPageBytes;

// Neighbouring pages in one request, and the entries that lie on them.
struct Run {
  int64_t first_page;
  int64_t pages;
  int64_t begin, end;   // entries
  uint64_t read_units;  // bit u: unit u must be read before it is written, as rows of it stay
};

// The run that starts with entry `begin`.
Run next_run(const Part& part, int64_t begin, bool write);

// One submission. Parts do not change once it is queued, but for the stale marks.
class Job {
 public:
  Job(bool write, std::vector<Part> parts) : write(write), parts(std::move(parts)) {}

  // Waits at most so long; returns whether the job is done.
  bool wait(double seconds);
  void finish();
  // Copies the marks of a part to out[count] and clears them; returns whether there were any.
  bool take_stale(size_t part, uint8_t* out);
  void mark(size_t part, const uint8_t* marks);
  void mark_written(const Job& writer);

  const bool write;
  std::vector<Part> parts;
  std::optional<DiskFailure> failure;  // set before `finish`
  int pending = 0;                     // runs in flight; the disk's thread only
  bool issued = false;                 // all runs have started; the disk's thread only

 private:
  std::mutex mutex_;
  std::condition_variable finished_;
  bool done_ = false;
};

}  // namespace shardlab
