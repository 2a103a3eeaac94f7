// Memory that a thread works in, kept from call to call: products follow each other.
#ifndef MOESAIC_BUFFER_H_
#define MOESAIC_BUFFER_H_

#include <cstddef>
#include <cstdint>
#include <new>

namespace moesaic {

// Uninitialised memory, aligned to a line of the cache.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { Free(); }

  // Room for `count` values; what it held is lost.
  template <class T>
  T* Get(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    if (bytes > bytes_) {
      Free();
      data_ = ::operator new(bytes, kAlignment);
      bytes_ = bytes;
    }
    return static_cast<T*>(data_);
  }

  // Gives back what is too large to be kept.
  void Trim() {
    if (bytes_ > kMostKept) Free();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  static constexpr size_t kMostKept = 32 << 20;

  void Free() {
    if (data_ != nullptr) ::operator delete(data_, kAlignment);
    data_ = nullptr;
    bytes_ = 0;
  }

  void* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace moesaic

#endif  // MOESAIC_BUFFER_H_
