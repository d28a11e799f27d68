// A lane: ordered all-to-alls between processes of one host, through shared memory.
//
// Every rank owns one segment: a doorbell, and towards every peer a ring that this rank fills and
// the peer empties. A message is a stream of bytes with its length in front; both sides know the
// length, so a message that differs is an error and not a wait. The sender copies once into the
// ring, the receiver copies once out of it.
#pragma once
#include <atomic>
#include <cstdint>
#include <deque>
#include <string>
#include <vector>

namespace shardlab {

/// What a rank sends to or receives from one peer, and how far it is.
struct Span {
  char* data = nullptr;
  int64_t bytes = 0;
  int64_t done = -1;  // -1: the length in front is still to come
  bool complete() const { return done == bytes; }
};

/// One all-to-all under way.
struct Transfer {
  int64_t number = 0;
  bool around = false;  // large: copied out of the rings around the caches
  std::vector<Span> sends, receives;  // by rank; this rank's own are empty and complete
};

/// One thread at a time; processes need no order but that of their transfers.
class Lane {
 public:
  /// Maps the segments of all ranks; `fds` by rank, not kept. Throws std::runtime_error.
  Lane(const std::vector<int>& fds, int rank, int64_t ring_bytes);
  ~Lane();
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  static int64_t segment_bytes(int ranks, int64_t ring_bytes);

  /// Starts an all-to-all: copies what the rings take and hold, and never waits. `same`: every rank
  /// gets the bytes at `source`; else each its own, one behind the other.
  int64_t start(char* source, const std::vector<int64_t>& source_bytes, char* out,
                const std::vector<int64_t>& out_bytes, bool same);
  /// Waits up to `milliseconds` for transfer `number` and those before it.
  bool wait(int64_t number, int64_t milliseconds);
  /// Ranks that the oldest transfer still waits for.
  std::vector<int> awaited() const;
  /// "" or what is wrong: a peer announced another length than this rank expects.
  const std::string& mismatch() const { return mismatch_; }

 private:
  struct Bell;
  struct Ring;
  Bell* bell(int rank) const;
  Ring* ring(int owner, int peer) const;
  char* ring_data(int owner, int peer) const;
  bool progress();
  bool push(Span& span, int peer);
  bool pull(Span& span, int peer, const Transfer& transfer);
  void put(int peer, uint64_t head, const char* data, int64_t bytes);
  void take(int peer, uint64_t tail, char* data, int64_t bytes, bool around);
  void forget_finished();

  int rank_, ranks_;
  int64_t ring_bytes_, segment_bytes_;
  std::vector<char*> segments_;
  std::deque<Transfer> transfers_;
  int64_t started_ = 0, finished_ = 0;
  std::string mismatch_;
};

}  // namespace shardlab
