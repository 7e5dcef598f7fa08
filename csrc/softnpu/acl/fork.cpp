#include "fork.h"

#include <pthread.h>

#include <atomic>

namespace softnpu {
namespace {

std::atomic<bool> child{false};

}  // namespace

void watch_forks() {
  [[maybe_unused]] static const int watched =
      pthread_atfork(nullptr, nullptr, [] { child = true; });
}

bool forked() { return child.load(std::memory_order_relaxed); }

}  // namespace softnpu
