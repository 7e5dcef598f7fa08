// Objects behind the C handles of one type. Their memory stays mapped and serves no other type, so
// any pointer can be asked whether it is a live one.
#pragma once

#include <sys/mman.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <utility>

namespace softnpu {

template <class T>
class Handles {
 public:
  static constexpr size_t kMost = size_t{1} << 20;  // alive at once

  // nullptr: kMost are alive.
  T* create(T value) {
    Slot* const slot = take();
    if (!slot) return nullptr;
    T* const object = std::construct_at(reinterpret_cast<T*>(slot->object), std::move(value));
    slot->live.store(true, std::memory_order_release);
    return object;
  }

  bool live(const T* handle) const {
    const Slot* const slot = slot_of(handle);
    return slot && slot->live.load(std::memory_order_acquire);
  }

  // False: it was not alive.
  bool destroy(const T* handle) {
    Slot* const slot = slot_of(handle);
    if (!slot || !slot->live.exchange(false)) return false;
    std::destroy_at(handle);
    std::lock_guard lock(mutex_);
    free_.push_back(slot);
    return true;
  }

 private:
  struct Slot {
    alignas(T) std::byte object[sizeof(T)];
    std::atomic<bool> live;  // starts as the zero of fresh pages
  };
  static constexpr size_t kRest =
      64;  // destroyed handles that are not given out again, so that misuse shows

  static Slot* reserve() {
    void* const start = mmap(nullptr, kMost * sizeof(Slot), PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return start == MAP_FAILED ? nullptr : static_cast<Slot*>(start);
  }

  Slot* take() {
    if (!slots_) return nullptr;
    std::lock_guard lock(mutex_);
    if (used_ < kMost && free_.size() < kRest) return &slots_[used_++];
    if (free_.empty()) return nullptr;
    Slot* const slot = free_.front();
    free_.pop_front();
    return slot;
  }

  Slot* slot_of(const T* handle) const {
    const size_t distance =
        reinterpret_cast<uintptr_t>(handle) - reinterpret_cast<uintptr_t>(slots_);
    if (!slots_ || distance >= kMost * sizeof(Slot) || distance % sizeof(Slot) != 0) return nullptr;
    return &slots_[distance / sizeof(Slot)];
  }

  Slot* const slots_ = reserve();
  std::mutex mutex_;
  size_t used_ = 0;
  std::deque<Slot*> free_;  // the longest dead first
};

}  // namespace softnpu
