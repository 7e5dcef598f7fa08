// What HCCL's entry points share. A collective is a task on the caller's stream; buffers are
// checked at the call and when it runs.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "comm.h"
#include "softnpu/acl/report.h"

namespace softnpu::hccl {

enum Result : int {
  kHcclOk = 0,
  kHcclParameter = 1,
  kHcclInternal = 4,
  kHcclNotSupported = 5,
  kHcclNotFound = 6,
  kHcclRemote = 21
};

int result_of(const Fault& fault);  // and the thread's last error

template <class Action>
int guarded(Action action) try {
  action();
  return kHcclOk;
} catch (const Fault& fault) {
  return result_of(fault);
}

std::shared_ptr<Comm> find(Handle handle);
// Of this process by its HcclGetCommName; null: there is none.
SOFTNPU_CXX std::shared_ptr<Comm> find_named(const std::string& name);

// A device buffer of a collective.
struct Buffer {
  const void* pointer;
  size_t bytes;
  unsigned char* get(const char* who) const;    // at the call: on the thread's device
  unsigned char* later(const char* who) const;  // when it runs
};

// What fails on one rank fails on all: a rank that stays away would shift everybody's rounds.
void launch(const char* name, Handle stream, const std::shared_ptr<Comm>& comm,
            std::function<void()> run);
// A collective: first all ranks say the same of it. -1: may differ.
void launch(const char* name, Handle stream, const std::shared_ptr<Comm>& comm,
            std::array<int64_t, 4> said, std::function<void()> run);
size_t bytes_of(uint64_t count, int dtype);
int known_rank(uint32_t rank, const Comm& comm, const char* what);

}  // namespace softnpu::hccl
