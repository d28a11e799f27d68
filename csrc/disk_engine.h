// Who carries out reads and writes of files: io_uring, or threads with pread and pwrite.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace shardlab {

// One request; `slot` is the caller's number of it, below the engine's depth.
struct Io {
  int fd;
  bool write;
  int slot;
  char* data;
  int64_t bytes;
  int64_t offset;
};

struct Completion {
  int slot;
  int64_t result;  // bytes moved, or -errno
};

// Used by one thread only.
class Engine {
 public:
  virtual ~Engine() = default;
  // Takes a request; it may start with the next `reap`.
  virtual void submit(const Io& io) = 0;
  // Appends completions; waits until there are `at_least`, which must be in flight.
  virtual void reap(int at_least, std::vector<Completion>& out) = 0;
};

// Memory that requests move to and from: registered with the kernel where that is allowed.
struct Buffers {
  char* base;
  int64_t bytes;
};

// nullptr where the kernel has none or does not permit it; `why_not` then says so.
std::unique_ptr<Engine> make_uring(int depth, Buffers buffers, std::string& why_not);
std::unique_ptr<Engine> make_threads(int threads);

}  // namespace shardlab
