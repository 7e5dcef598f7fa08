// Scratch memory of a thread, which grows and is kept.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace dsv4::cpu {

class ThreadBuffer {
 public:
  // At least `count` elements, aligned to a cache line, that hold anything.
  template <class T>
  T* of(int64_t count) {
    const auto bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    if (bytes > size_) {
      memory_.reset(std::aligned_alloc(64, bytes));
      size_ = memory_ ? bytes : 0;
      if (!memory_) {
        throw std::bad_alloc();
      }
    }
    return static_cast<T*>(memory_.get());
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };

  std::unique_ptr<void, Free> memory_;
  size_t size_ = 0;
};

}  // namespace dsv4::cpu
