// The engine where io_uring is not permitted: threads that sit in pread and pwrite.
#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

#include "disk_engine.h"

namespace shardlab {
namespace {

class Threads : public Engine {
 public:
  explicit Threads(int count) {
    for (int i = 0; i < count; ++i) workers_.emplace_back([this] { work(); });
  }

  ~Threads() override {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    asked_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  void submit(const Io& io) override {
    {
      const std::lock_guard lock(mutex_);
      queue_.push_back(io);
    }
    asked_.notify_one();
  }

  void reap(int at_least, std::vector<Completion>& out) override {
    std::unique_lock lock(mutex_);
    done_.wait(lock, [&] { return (int)completions_.size() >= at_least; });
    out.insert(out.end(), completions_.begin(), completions_.end());
    completions_.clear();
  }

 private:
  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      asked_.wait(lock, [&] { return stop_ || !queue_.empty(); });
      if (queue_.empty()) return;
      const Io io = queue_.front();
      queue_.pop_front();
      lock.unlock();
      const ssize_t moved = io.write ? pwrite(io.fd, io.data, io.bytes, io.offset)
                                     : pread(io.fd, io.data, io.bytes, io.offset);
      const int64_t result = moved < 0 ? -errno : moved;
      lock.lock();
      completions_.push_back({io.slot, result});
      done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable asked_, done_;
  std::deque<Io> queue_;
  std::vector<Completion> completions_;
  std::vector<std::thread> workers_;
  bool stop_ = false;
};

}  // namespace

std::unique_ptr<Engine> make_threads(int threads) { return std::make_unique<Threads>(threads); }

}  // namespace shardlab
