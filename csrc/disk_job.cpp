// Sorting of rows, cutting into runs, and the marks of records that a later write made stale.
#include "disk_job.h"

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>

namespace shardlab {
namespace {

constexpr int kDigitBits = 11;  // 2048 counters: 16 KiB, half of an L1
// Pages that a read crosses to join two runs. One request more costs the disk what some five pages
// more cost it (13 us and 2.4 us where this was measured).
constexpr int64_t kMaxGap = 4;

// Stable radix sort of rows with their positions; `largest` bounds the rows.
void sort_rows(std::vector<int64_t>& rows, std::vector<int64_t>& positions, int64_t largest) {
  struct Pair {
    int64_t row, position;
  };
  const int64_t n = (int64_t)rows.size();
  std::vector<Pair> a(n), b(n);
  for (int64_t i = 0; i < n; ++i) a[i] = {rows[i], i};
  for (int shift = 0; shift < (int)std::bit_width((uint64_t)largest); shift += kDigitBits) {
    std::array<int64_t, (1 << kDigitBits) + 1> first{};
    const auto digit = [shift](const Pair& p) { return (p.row >> shift) & ((1 << kDigitBits) - 1); };
    for (const Pair& p : a) ++first[digit(p) + 1];
    for (int d = 0; d < 1 << kDigitBits; ++d) first[d + 1] += first[d];
    for (const Pair& p : a) b[first[digit(p)]++] = p;
    a.swap(b);
  }
  positions.resize(n);
  for (int64_t i = 0; i < n; ++i) {
    rows[i] = a[i].row;
    positions[i] = a[i].position;
  }
}

// The first entry from `e` on whose row is at least `row`.
int64_t seek(const Part& part, int64_t e, int64_t row) {
  if (part.rows.empty()) return std::clamp(row - part.start, e, part.count);
  int64_t step = 1;  // gallop: one side is often much longer than the other
  while (e + step < part.count && part.rows[e + step] < row) step *= 2;
  const auto begin = part.rows.begin();
  const int64_t last = std::min(e + step, part.count);
  return std::lower_bound(begin + e, begin + last, row) - begin;
}

}  // namespace

int64_t take_rows(Part& part, const int64_t* rows) {
  part.rows.assign(rows, rows + part.count);
  if (part.count == 0) return 0;
  const auto [least, largest] = std::minmax_element(part.rows.begin(), part.rows.end());
  if (*least < 0) return *least;
  if (!std::is_sorted(part.rows.begin(), part.rows.end()))
    sort_rows(part.rows, part.positions, *largest);
  return 0;
}

bool mark_stale(Part& read, const Part& written) {
  bool any = false;
  int64_t i = 0, j = 0;
  while (i < read.count && j < written.count) {
    const int64_t row = read.row(i), other = written.row(j);
    if (row < other) {
      i = seek(read, i, other);
    } else if (other < row) {
      j = seek(written, j, row);
    } else {
      if (read.stale.empty()) read.stale.resize(read.count);
      read.stale[read.positions.empty() ? i : read.positions[i]] = 1;
      any = true;
      ++i;
    }
  }
  return any;
}

Run next_run(const Part& part, int64_t begin, bool write) {
  const PageLayout& layout = part.file->layout;
  const int64_t first_unit = layout.unit_of(part.row(begin));
  const int64_t max_units = kRequestPages / layout.pages;
  const int64_t max_step = write ? 1 : 1 + kMaxGap / layout.pages;
  Run run{layout.first_page(first_unit), 0, begin, begin, 0};
  int64_t unit = first_unit;
  while (run.end < part.count) {
    const int64_t next = layout.unit_of(part.row(run.end));
    if (next - unit > max_step || next - first_unit >= max_units) break;
    unit = next;
    const int64_t low = unit * layout.records;
    const int64_t high = low + layout.records;
    int64_t distinct = 0;
    if (part.rows.empty()) {
      const int64_t stop = std::min(part.count, high - part.start);
      distinct = stop - run.end;
      run.end = stop;
    } else {
      for (int64_t last = -1; run.end < part.count && part.rows[run.end] < high; ++run.end) {
        distinct += part.rows[run.end] != last;
        last = part.rows[run.end];
      }
    }
    // Rows of the unit that were given before and do not come now stay as they are. Rows that come
    // for the first time can only follow all others, so those that stay are a matter of counting.
    const int64_t before = std::max<int64_t>(0, std::min(high, part.written) - low);
    const int64_t renewed = part.rows.empty()
                                ? std::max<int64_t>(0, std::min(part.row(run.end - 1) + 1,
                                                                low + before) -
                                                           std::max(part.start, low))
                                : distinct;
    if (write && renewed < before) run.read_units |= 1ULL << (unit - first_unit);
  }
  run.pages = (unit - first_unit + 1) * layout.pages;
  return run;
}

bool Job::wait(double seconds) {
  std::unique_lock lock(mutex_);
  return finished_.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return done_; });
}

void Job::finish() {
  const std::lock_guard lock(mutex_);
  done_ = true;
  finished_.notify_all();
}

bool Job::take_stale(size_t part, uint8_t* out) {
  const std::lock_guard lock(mutex_);
  auto& stale = parts.at(part).stale;
  const bool any = !stale.empty();
  if (any)
    std::copy(stale.begin(), stale.end(), out);
  else
    std::fill_n(out, parts[part].count, 0);
  stale.clear();
  return any;
}

void Job::mark(size_t part, const uint8_t* marks) {
  const std::lock_guard lock(mutex_);
  auto& target = parts.at(part);
  target.stale.resize(target.count);
  for (int64_t i = 0; i < target.count; ++i) target.stale[i] |= marks[i];
}

void Job::mark_written(const Job& writer) {
  const std::lock_guard lock(mutex_);
  for (Part& read : parts)
    for (const Part& written : writer.parts)
      if (read.file == written.file) mark_stale(read, written);
}

}  // namespace shardlab
