#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace signbit {
namespace {

// About 30 µs on a current processor: longer than the gap between two layers, shorter than anybody would notice.
constexpr int SPINS = 3000;

inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  void run(int threads, int tasks, void (*body)(void *, int), void *context) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock() || threads <= 1 || tasks <= 1 || !grow(threads - 1)) {
      for (int i = 0; i < tasks; i++) body(context, i);
      return;
    }
    // An odd job number says that the fields beside the ticket are being changed.
    uint64_t job = ((ticket_.load() >> 32) + 2) & 0xffffffffu;
    if (job == 0) job = 2; // what a helper has seen before its first
    ticket_.store((job - 1) << 32);
    body_.store(body);
    context_.store(context);
    tasks_.store(tasks);
    helpers_.store(threads - 1);
    finished_.store(0);
    ticket_.store(job << 32);
    if (sleeping_.load() > 0) {
      { std::lock_guard<std::mutex> guard(sleep_); }
      wake_.notify_all();
    }
    work(job);
    for (int spins = 0; finished_.load(std::memory_order_acquire) < tasks; spins++) {
      if (spins < SPINS) relax();
      else std::this_thread::yield();
    }
  }

 private:
  // Takes tasks of `job` until none is left. A ticket is (job << 32 | next task). All loads and stores are sequentially
  // consistent: whoever read fields of a later job read them after the ticket had changed, and its exchange fails; and
  // while a task is not yet taken its job cannot end, so what was read beside the ticket holds.
  void work(uint64_t job) {
    uint64_t ticket = ticket_.load();
    while (ticket >> 32 == job) {
      const int task = static_cast<int>(ticket & 0xffffffffu);
      auto *body = body_.load();
      void *context = context_.load();
      if (task >= tasks_.load()) return;
      if (!ticket_.compare_exchange_weak(ticket, ticket + 1)) continue;
      body(context, task);
      finished_.fetch_add(1);
      ticket = ticket_.load();
    }
  }

  void loop(int index) {
    uint64_t seen = 0, job = 0;
    auto fresh = [&] { return (job = ticket_.load() >> 32) != seen && job % 2 == 0; };
    for (;;) {
      int spins = 0;
      while (spins < SPINS && !fresh()) {
        relax();
        spins++;
      }
      if (spins == SPINS) {
        std::unique_lock<std::mutex> guard(sleep_);
        sleeping_.fetch_add(1);
        wake_.wait(guard, fresh);
        sleeping_.fetch_sub(1);
      }
      seen = job;
      if (index < helpers_.load()) work(job);
    }
  }

  bool grow(int workers) {
    while (static_cast<int>(count_) < workers) {
      try {
        const int index = count_;
        std::thread([this, index] { loop(index); }).detach();
      } catch (...) {
        return count_ > 0;
      }
      count_++;
    }
    return true;
  }

  std::mutex turn_, sleep_;
  std::condition_variable wake_;
  std::atomic<uint64_t> ticket_{0};
  std::atomic<int> tasks_{0}, finished_{0}, helpers_{0}, sleeping_{0};
  std::atomic<void (*)(void *, int)> body_{nullptr};
  std::atomic<void *> context_{nullptr};
  int count_ = 0;
};

// Never destroyed: its threads may outlive static destructors. Made when the library is loaded, so that no fork can fall
// into its making.
std::atomic<Pool *> pool{new Pool};

#if !defined(_WIN32)
// The threads are not in a forked child: it starts with a pool of its own and leaves the old one as it was.
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { pool.store(new Pool); });
#endif

struct Arena {
  void *memory = nullptr;
  size_t bytes = 0;
  ~Arena() { std::free(memory); }
};
thread_local Arena arena;

} // namespace

void parallel(int threads, int tasks, void (*body)(void *, int), void *context) {
  pool.load()->run(threads, tasks, body, context);
}

void *scratch(size_t bytes) {
  if (arena.bytes < bytes) {
    std::free(arena.memory);
    arena.bytes = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    arena.memory = std::aligned_alloc(4096, arena.bytes);
    if (arena.memory == nullptr) arena.bytes = 0;
  }
  return arena.memory;
}

} // namespace signbit
