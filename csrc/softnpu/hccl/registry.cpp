#include "registry.h"

#include <mutex>
#include <set>

#include "comm.h"

namespace softnpu::hccl {
namespace {

struct Registry {
  std::mutex mutex;
  std::set<Comm*> comms;
};

Registry& registry() {
  static auto* const instance = new Registry;
  return *instance;
}

// A process that ends normally leaves its communicators in good order.
__attribute__((destructor)) void leave_all() {
  std::lock_guard lock(registry().mutex);
  for (Comm* comm : registry().comms) comm->leave();
}

}  // namespace

void register_comm(Comm* comm) {
  std::lock_guard lock(registry().mutex);
  registry().comms.insert(comm);
}

void forget_comm(Comm* comm) {
  std::lock_guard lock(registry().mutex);
  registry().comms.erase(comm);
}

std::string lost_anywhere() {
  std::lock_guard lock(registry().mutex);
  for (const Comm* comm : registry().comms)
    if (std::string lost = comm->lost_peer(); !lost.empty()) return lost;
  return "";
}

}  // namespace softnpu::hccl
