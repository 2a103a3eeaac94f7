// Loops over tasks on XLA's own threads.
#ifndef MOESAIC_PARALLEL_H_
#define MOESAIC_PARALLEL_H_

#include <cstdint>

#include "xla/ffi/api/ffi.h"

namespace moesaic {

// ParallelFor with the body's type taken away: run(body, task) is one task.
void ParallelLoop(xla::ffi::ThreadPool& pool, int64_t num_tasks,
                  void (*run)(const void* body, int64_t task), const void* body);

// Calls fn(task) for each task in [0, num_tasks), on the calling thread and those of the pool.
//
// Tasks are claimed one at a time, and the caller claims too: it waits only for tasks that another
// thread has begun. So a pool whose threads are all busy, even with callers of this function, makes
// it slower but can't deadlock, and no thread is ever added to XLA's.
template <class Fn>
void ParallelFor(xla::ffi::ThreadPool& pool, int64_t num_tasks, const Fn& fn) {
  if (num_tasks == 1) {
    fn(0);
  } else if (num_tasks > 1) {
    const auto run = [](const void* body, int64_t task) { (*static_cast<const Fn*>(body))(task); };
    ParallelLoop(pool, num_tasks, run, &fn);
  }
}

}  // namespace moesaic

#endif  // MOESAIC_PARALLEL_H_
