// io_uring through raw system calls: two rings that are shared with the kernel, one system call to
// hand over a batch of requests and wait for completions. Source: io_uring(7), io_uring_setup(2).
#include "disk_engine.h"

#if defined(__linux__) && __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>

namespace shardlab {
namespace {

// A ring word that the kernel reads or writes at the same time.
unsigned load(const unsigned* word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
void store(unsigned* word, unsigned value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }

struct Mapping {
  char* base = nullptr;
  size_t bytes = 0;

  bool map(int ring, size_t size, uint64_t offset) {
    void* at = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring,
                    (off_t)offset);
    if (at == MAP_FAILED) return false;
    base = (char*)at;
    bytes = size;
    return true;
  }
  ~Mapping() {
    if (base != nullptr) munmap(base, bytes);
  }
};

class Uring : public Engine {
 public:
  ~Uring() override {
    if (ring_ >= 0) close(ring_);
  }

  // 0, or errno.
  int open(int depth, Buffers buffers) {
    io_uring_params params;
    std::memset(&params, 0, sizeof params);
    params.flags = IORING_SETUP_CLAMP;
    ring_ = (int)syscall(__NR_io_uring_setup, depth, &params);
    if (ring_ < 0) return errno;
    // READ and WRITE came with kernel 5.6, which is also the first that reports this feature.
    if (!(params.features & IORING_FEAT_RW_CUR_POS)) return ENOSYS;
    const bool mapped =
        queue_.map(ring_, params.sq_off.array + params.sq_entries * sizeof(unsigned),
                   IORING_OFF_SQ_RING) &&
        done_.map(ring_, params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe),
                  IORING_OFF_CQ_RING) &&
        entries_.map(ring_, params.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES);
    if (!mapped) return errno;
    attach(params);
    // Registered memory spares the kernel a page walk per request (a tenth of its time). It counts
    // against the limit of locked memory; where that is too low, requests go without.
    const iovec all{buffers.base, (size_t)buffers.bytes};
    registered_ = syscall(__NR_io_uring_register, ring_, IORING_REGISTER_BUFFERS, &all, 1) == 0;
    return 0;
  }

  void submit(const Io& io) override {
    const unsigned tail = *queue_tail_;
    io_uring_sqe& entry = ((io_uring_sqe*)entries_.base)[tail & queue_mask_];
    std::memset(&entry, 0, sizeof entry);
    if (registered_)
      entry.opcode = io.write ? IORING_OP_WRITE_FIXED : IORING_OP_READ_FIXED;
    else
      entry.opcode = io.write ? IORING_OP_WRITE : IORING_OP_READ;
    entry.fd = io.fd;
    entry.off = (uint64_t)io.offset;
    entry.addr = (uint64_t)io.data;
    entry.len = (unsigned)io.bytes;
    entry.user_data = (uint64_t)io.slot;
    queue_array_[tail & queue_mask_] = tail & queue_mask_;
    store(queue_tail_, tail + 1);
    ++unsubmitted_;
  }

  void reap(int at_least, std::vector<Completion>& out) override {
    int found = 0;
    do {
      const unsigned missing = (unsigned)std::max(0, at_least - found);
      const long taken = syscall(__NR_io_uring_enter, ring_, unsubmitted_, missing,
                                 IORING_ENTER_GETEVENTS, nullptr, 0);
      if (taken >= 0)
        unsubmitted_ -= (unsigned)taken;
      else if (errno != EINTR && errno != EAGAIN && errno != EBUSY)
        throw std::system_error(errno, std::generic_category(), "io_uring_enter");
      found += collect(out);
    } while (found < at_least || unsubmitted_ > 0);
  }

 private:
  void attach(const io_uring_params& params) {
    queue_tail_ = (unsigned*)(queue_.base + params.sq_off.tail);
    queue_mask_ = *(unsigned*)(queue_.base + params.sq_off.ring_mask);
    queue_array_ = (unsigned*)(queue_.base + params.sq_off.array);
    done_head_ = (unsigned*)(done_.base + params.cq_off.head);
    done_tail_ = (unsigned*)(done_.base + params.cq_off.tail);
    done_mask_ = *(unsigned*)(done_.base + params.cq_off.ring_mask);
    completions_ = (io_uring_cqe*)(done_.base + params.cq_off.cqes);
  }

  int collect(std::vector<Completion>& out) {
    unsigned head = *done_head_;
    const unsigned tail = load(done_tail_);
    const int count = (int)(tail - head);
    for (; head != tail; ++head) {
      const io_uring_cqe& entry = completions_[head & done_mask_];
      out.push_back({(int)entry.user_data, entry.res});
    }
    store(done_head_, head);
    return count;
  }

  int ring_ = -1;
  Mapping queue_, done_, entries_;
  unsigned* queue_tail_ = nullptr;
  unsigned* queue_array_ = nullptr;
  unsigned queue_mask_ = 0;
  unsigned* done_head_ = nullptr;
  unsigned* done_tail_ = nullptr;
  unsigned done_mask_ = 0;
  io_uring_cqe* completions_ = nullptr;
  unsigned unsubmitted_ = 0;
  bool registered_ = false;
};

}  // namespace

std::unique_ptr<Engine> make_uring(int depth, Buffers buffers, std::string& why_not) {
  auto engine = std::make_unique<Uring>();
  const int error = engine->open(depth, buffers);
  if (error == 0) return engine;
  why_not = error == ENOSYS ? "this kernel is older than 5.6" : std::strerror(error);
  return nullptr;
}

}  // namespace shardlab

#else

namespace shardlab {
std::unique_ptr<Engine> make_uring(int, Buffers, std::string& why_not) {
  why_not = "this build has no io_uring";
  return nullptr;
}
}  // namespace shardlab

#endif
