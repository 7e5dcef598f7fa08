#include "scratch.h"

#include "cpu/thread_buffer.h"

void* dsv4::cpu::scratch(std::size_t bytes) {
  thread_local ThreadBuffer buffer;
  return buffer.of<std::byte>(static_cast<int64_t>(bytes));
}
