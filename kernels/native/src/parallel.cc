// A thread of the pool that has helped with one loop waits a moment for the next before it goes
// back: a decoding step calls dozens of kernels that take microseconds each, and to wake a sleeping
// thread takes as long as one of them.
#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

namespace moesaic {
namespace {

// How long a helper waits for its next loop. XLA lacks the thread so long, so it must be short
// beside what is worth sharing out, and longer than what lies between two products in decoding.
constexpr std::chrono::microseconds kLinger{30};
// Waiting helpers that are kept track of; more go back to the pool at once.
constexpr int kPlaces = 64;

void Pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// One call of ParallelLoop. A thread that comes late finds no task left: it touches the loop, which
// its holders share, and never the body, which lies on the caller's stack.
struct Loop {
  void (*run)(const void* body, int64_t task);
  const void* body;
  int64_t num_tasks;
  std::atomic<int64_t> holders;
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> done{0};  // counted by each thread when it finds no more

  void Work() {
    int64_t own = 0;
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks; ++own) {
      run(body, task);
    }
    if (own > 0) done.fetch_add(own, std::memory_order_release);
  }

  void Release() {
    if (holders.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
  }
};

// Where a helper waits: nullptr where none does, Waiting() where one does, else the loop it is to
// help with.
struct alignas(64) Place {
  std::atomic<Loop*> loop{nullptr};
};

Place places[kPlaces];
std::atomic<int> num_waiting{0};

Loop* Waiting() {
  static char address;
  return reinterpret_cast<Loop*>(&address);
}

// The next loop, held for this thread; nullptr: none came.
Loop* AwaitLoop() {
  for (Place& place : places) {
    Loop* expected = nullptr;
    if (!place.loop.compare_exchange_strong(expected, Waiting())) continue;
    num_waiting.fetch_add(1);
    const auto end = std::chrono::steady_clock::now() + kLinger;
    for (int spins = 1; place.loop.load(std::memory_order_acquire) == Waiting(); ++spins) {
      Pause();
      if (spins % 32 != 0 || std::chrono::steady_clock::now() < end) continue;
      Loop* waiting = Waiting();
      if (place.loop.compare_exchange_strong(waiting, nullptr)) {
        num_waiting.fetch_sub(1);
        return nullptr;
      }
    }
    return place.loop.exchange(nullptr);
  }
  return nullptr;
}

// What a thread of the pool does: this loop, and those that come soon after it.
void Help(Loop* loop) {
  for (; loop != nullptr; loop = AwaitLoop()) {
    loop->Work();
    loop->Release();
  }
}

// Hands the loop to waiting helpers; how many took it.
int64_t HandToWaiting(Loop* loop, int64_t wanted) {
  int64_t taken = 0;
  for (int i = 0; i < kPlaces && taken < wanted && num_waiting.load() > 0; ++i) {
    Loop* waiting = Waiting();
    if (places[i].loop.load(std::memory_order_relaxed) != waiting) continue;
    if (places[i].loop.compare_exchange_strong(waiting, loop)) {
      num_waiting.fetch_sub(1);
      ++taken;
    }
  }
  return taken;
}

}  // namespace

void ParallelLoop(xla::ffi::ThreadPool& pool, int64_t num_tasks,
                  void (*run)(const void* body, int64_t task), const void* body) {
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), num_tasks) - 1;
  Loop* loop = new Loop{run, body, num_tasks, {helpers + 1}};
  for (int64_t i = HandToWaiting(loop, helpers); i < helpers; ++i) {
    pool.Schedule([loop] { Help(loop); });
  }
  loop->Work();
  for (int spins = 0; loop->done.load(std::memory_order_acquire) < num_tasks; ++spins) {
    if (spins < 1024) {
      Pause();
    } else {
      std::this_thread::yield();
    }
  }
  loop->Release();
}

}  // namespace moesaic
