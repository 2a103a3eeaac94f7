// Loops over tasks on XLA's own threads.
#ifndef MOESAIC_PARALLEL_H_
#define MOESAIC_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace moesaic {

// Calls fn(task) for each task in [0, num_tasks), on the calling thread and those of the pool.
//
// Tasks are claimed one at a time, and the caller claims too: it waits only for tasks that a thread
// of the pool has begun. So a pool whose threads are all busy, even with callers of this function,
// makes it slower but can't deadlock, and no thread is ever added to XLA's.
template <class Fn>
void ParallelFor(xla::ffi::ThreadPool& pool, int64_t num_tasks, const Fn& fn) {
  if (num_tasks <= 1) {
    if (num_tasks == 1) fn(0);
    return;
  }
  struct State {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
  };
  // A thread that the pool runs late finds no task left; it touches the state, which it shares,
  // and never fn, which lies on the caller's stack.
  auto state = std::make_shared<State>();
  const Fn* body = &fn;
  auto work = [state, body, num_tasks] {
    for (int64_t task; (task = state->next.fetch_add(1)) < num_tasks;) {
      (*body)(task);
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), num_tasks) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work(); });
  work();
  for (int spins = 0; state->done.load(std::memory_order_acquire) < num_tasks; ++spins) {
    if (spins > 256) std::this_thread::yield();
  }
}

}  // namespace moesaic

#endif  // MOESAIC_PARALLEL_H_
