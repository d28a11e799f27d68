#include "lane.h"

#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>
#include <numeric>
#include <stdexcept>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace shardlab {
namespace {

constexpr int64_t kLine = 64, kPage = 4096;
constexpr int64_t kLengthBytes = 8;
// Bytes copied before the other side is told: it copies them out of a shared cache while this side
// goes on. Smaller pieces ring more often, larger ones leave the second-level cache.
constexpr int64_t kPieceBytes = 128 << 10;
// What is this large leaves the second-level cache before all of it has come, so it is written
// around the caches: a copy reads its target first, a third of what it moves.
constexpr int64_t kAroundBytes = 4 << 20;
// Looks before sleeping: about 5 us, what a wake-up costs.
constexpr int kLooks = 64;

int64_t now_ms() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1000 + time.tv_nsec / 1000000;
}

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// memcpy around the caches: done when it returns.
void copy_around(char* target, const char* source, int64_t bytes) {
#if defined(__x86_64__)
  const int64_t lead = std::min(bytes, -(int64_t)(uintptr_t)target & (kLine - 1));
  memcpy(target, source, lead);
  int64_t at = lead;
  for (; at + kLine <= bytes; at += kLine) {
    const __m128i* from = reinterpret_cast<const __m128i*>(source + at);
    __m128i* to = reinterpret_cast<__m128i*>(target + at);
    const __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1);
    const __m128i c = _mm_loadu_si128(from + 2), d = _mm_loadu_si128(from + 3);
    _mm_stream_si128(to, a);
    _mm_stream_si128(to + 1, b);
    _mm_stream_si128(to + 2, c);
    _mm_stream_si128(to + 3, d);
  }
  memcpy(target + at, source + at, bytes - at);
  _mm_sfence();
#else
  memcpy(target, source, bytes);
#endif
}

void sleep_while(std::atomic<uint32_t>& word, uint32_t seen, int64_t milliseconds) {
#if defined(__linux__)
  const timespec limit{milliseconds / 1000, (milliseconds % 1000) * 1000000};
  syscall(SYS_futex, &word, FUTEX_WAIT, seen, &limit, nullptr, 0);
#else
  const timespec nap{0, 50000};
  if (word.load() == seen && milliseconds > 0) nanosleep(&nap, nullptr);
#endif
}

void wake(std::atomic<uint32_t>& word) {
#if defined(__linux__)
  syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
#else
  (void)word;
#endif
}

}  // namespace

// Rung by any peer that filled or emptied a ring of this rank; it sleeps on `rings`.
struct Lane::Bell {
  alignas(kLine) std::atomic<uint32_t> rings;
  alignas(kLine) std::atomic<uint32_t> asleep;
};

// Bytes ever written by the owner and ever read by the peer; each on a line of its own.
struct Lane::Ring {
  alignas(kLine) std::atomic<uint64_t> head;
  alignas(kLine) std::atomic<uint64_t> tail;
};

Lane::Bell* Lane::bell(int rank) const { return reinterpret_cast<Bell*>(segments_[rank]); }

Lane::Ring* Lane::ring(int owner, int peer) const {
  return reinterpret_cast<Ring*>(segments_[owner] + sizeof(Bell)) + peer;
}

char* Lane::ring_data(int owner, int peer) const {
  return segments_[owner] + segment_bytes(ranks_, 0) + peer * ring_bytes_;
}

int64_t Lane::segment_bytes(int ranks, int64_t ring_bytes) {
  const int64_t control = sizeof(Bell) + ranks * sizeof(Ring);
  return (control + kPage - 1) / kPage * kPage + ranks * ring_bytes;
}

Lane::Lane(const std::vector<int>& fds, int rank, int64_t ring_bytes)
    : rank_(rank),
      ranks_((int)fds.size()),
      ring_bytes_(ring_bytes),
      segment_bytes_(segment_bytes(ranks_, ring_bytes)) {
  for (const int fd : fds) {
    void* at = mmap(nullptr, segment_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) {
      const int error = errno;
      for (char* segment : segments_) munmap(segment, segment_bytes_);
      throw std::runtime_error(std::string("mapping shared memory failed: ") + strerror(error));
    }
    segments_.push_back(static_cast<char*>(at));
  }
}

Lane::~Lane() {
  for (char* segment : segments_) munmap(segment, segment_bytes_);
}

int64_t Lane::start(char* source, const std::vector<int64_t>& source_bytes, char* out,
                    const std::vector<int64_t>& out_bytes, bool same) {
  Transfer transfer;
  transfer.number = ++started_;
  transfer.around = std::accumulate(out_bytes.begin(), out_bytes.end(), int64_t{0}) >= kAroundBytes;
  for (int peer = 0; peer < ranks_; ++peer) {
    const bool own = peer == rank_;
    if (own && out != source) memcpy(out, source, std::min(source_bytes[peer], out_bytes[peer]));
    transfer.sends.push_back({source, source_bytes[peer], own ? source_bytes[peer] : -1});
    transfer.receives.push_back({out, out_bytes[peer], own ? out_bytes[peer] : -1});
    if (!same) source += source_bytes[peer];
    out += out_bytes[peer];
  }
  transfers_.push_back(std::move(transfer));
  while (progress()) continue;
  return started_;
}

bool Lane::wait(int64_t number, int64_t milliseconds) {
  const int64_t deadline = now_ms() + milliseconds;
  Bell& own = *bell(rank_);
  for (int looks = 0; finished_ < number;) {
    const uint32_t seen = own.rings.load(std::memory_order_acquire);
    const bool moved = progress();
    if (!mismatch_.empty() || finished_ >= number) return mismatch_.empty();
    if (moved) {
      looks = 0;
      continue;
    }
    if (++looks < kLooks) {
      for (int i = 0; i < 8; ++i) pause();
      continue;
    }
    const int64_t left = deadline - now_ms();
    if (left <= 0) return false;
    // A peer rings first and looks at `asleep` then; whoever comes second sees the other.
    own.asleep.store(1);
    if (own.rings.load() == seen) sleep_while(own.rings, seen, left);
    own.asleep.store(0);
  }
  return true;
}

std::vector<int> Lane::awaited() const {
  std::vector<int> found;
  if (transfers_.empty()) return found;
  const Transfer& oldest = transfers_.front();
  for (int peer = 0; peer < ranks_; ++peer)
    if (!oldest.sends[peer].complete() || !oldest.receives[peer].complete()) found.push_back(peer);
  return found;
}

// Moves what can be moved, in the order of transfers; false: nothing could.
bool Lane::progress() {
  bool moved = false;
  // Begins behind this rank, so that not all ranks fill the same ring first.
  for (int step = 1; step < ranks_; ++step) {
    const int peer = (rank_ + step) % ranks_;
    for (Transfer& transfer : transfers_) {
      if (!transfer.sends[peer].complete()) moved |= push(transfer.sends[peer], peer);
      if (!transfer.sends[peer].complete()) break;
    }
    for (Transfer& transfer : transfers_) {
      Span& span = transfer.receives[peer];
      if (!span.complete()) moved |= pull(span, peer, transfer);
      if (!span.complete()) break;
    }
  }
  forget_finished();
  return moved;
}

void Lane::forget_finished() {
  const auto complete = [](const Span& span) { return span.complete(); };
  while (!transfers_.empty()) {
    const Transfer& oldest = transfers_.front();
    if (!std::all_of(oldest.sends.begin(), oldest.sends.end(), complete) ||
        !std::all_of(oldest.receives.begin(), oldest.receives.end(), complete))
      return;
    finished_ = oldest.number;
    transfers_.pop_front();
  }
}

namespace {

template <class Bell>
void ring_bell(Bell& bell) {
  bell.rings.fetch_add(1);
  if (bell.asleep.load()) wake(bell.rings);
}

}  // namespace

// One piece into the ring towards `peer`.
bool Lane::push(Span& span, int peer) {
  Ring& own = *ring(rank_, peer);
  const uint64_t head = own.head.load(std::memory_order_relaxed);
  const int64_t space = ring_bytes_ - (int64_t)(head - own.tail.load(std::memory_order_acquire));
  int64_t written = 0;
  if (span.done < 0) {
    if (space < kLengthBytes) return false;
    put(peer, head, reinterpret_cast<const char*>(&span.bytes), kLengthBytes);
    span.done = 0;
    written = kLengthBytes;
  }
  const int64_t piece = std::min({span.bytes - span.done, space - written, kPieceBytes});
  if (piece > 0) {
    put(peer, head + written, span.data + span.done, piece);
    span.done += piece;
    written += piece;
  }
  if (written == 0) return false;
  own.head.store(head + written, std::memory_order_release);
  ring_bell(*bell(peer));
  return true;
}

// One piece out of the ring that `peer` fills for this rank.
bool Lane::pull(Span& span, int peer, const Transfer& transfer) {
  Ring& theirs = *ring(peer, rank_);
  const uint64_t tail = theirs.tail.load(std::memory_order_relaxed);
  int64_t there = (int64_t)(theirs.head.load(std::memory_order_acquire) - tail);
  int64_t taken = 0;
  if (span.done < 0) {
    if (there < kLengthBytes) return false;
    int64_t announced = 0;
    take(peer, tail, reinterpret_cast<char*>(&announced), kLengthBytes, false);
    if (announced != span.bytes) {
      mismatch_ = "rank " + std::to_string(peer) + " sends " + std::to_string(announced) +
                  " bytes in transfer " + std::to_string(transfer.number) + ", this rank expects " +
                  std::to_string(span.bytes);
      return false;
    }
    span.done = 0;
    taken = kLengthBytes;
  }
  const int64_t piece = std::min({span.bytes - span.done, there - taken, kPieceBytes});
  if (piece > 0) {
    take(peer, tail + taken, span.data + span.done, piece, transfer.around);
    span.done += piece;
    taken += piece;
  }
  if (taken == 0) return false;
  theirs.tail.store(tail + taken, std::memory_order_release);
  ring_bell(*bell(peer));
  return true;
}

void Lane::put(int peer, uint64_t head, const char* data, int64_t bytes) {
  char* base = ring_data(rank_, peer);
  const int64_t at = (int64_t)(head % (uint64_t)ring_bytes_);
  const int64_t first = std::min(bytes, ring_bytes_ - at);
  memcpy(base + at, data, first);
  memcpy(base, data + first, bytes - first);
}

void Lane::take(int peer, uint64_t tail, char* data, int64_t bytes, bool around) {
  const char* base = ring_data(peer, rank_);
  const int64_t at = (int64_t)(tail % (uint64_t)ring_bytes_);
  const int64_t first = std::min(bytes, ring_bytes_ - at);
  if (around) {
    copy_around(data, base + at, first);
    copy_around(data + first, base, bytes - first);
  } else {
    memcpy(data, base + at, first);
    memcpy(data + first, base, bytes - first);
  }
}

}  // namespace shardlab
