// Memory that a thread keeps for what it works with.
#ifndef MOESAIC_SCRATCH_H_
#define MOESAIC_SCRATCH_H_

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace moesaic {

// Floats aligned to 64 bytes: kept for a thread's life where it is thread_local, as many as there
// ever had to be.
class Scratch {
 public:
  float* Take(int64_t floats) {
    if (size_ < floats) {
      memory_.reset();
      size_ = 0;
      const int64_t bytes = (floats * static_cast<int64_t>(sizeof(float)) + 63) / 64 * 64;
      memory_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
      if (memory_ == nullptr) throw std::bad_alloc();
      size_ = floats;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t size_ = 0;
};

// The calling thread's, for one task at a time.
inline float* ThreadScratch(int64_t floats) {
  thread_local Scratch scratch;
  return scratch.Take(floats);
}

}  // namespace moesaic

#endif  // MOESAIC_SCRATCH_H_
