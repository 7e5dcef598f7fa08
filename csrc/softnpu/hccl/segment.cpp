#include "segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>

#include "softnpu/acl/report.h"

namespace softnpu::hccl {
namespace {

Fault unusable(const std::string& name) {
  return {kNnRuntime, "softnpu: shared memory " + name + ": " + std::strerror(errno)};
}

void* map(const std::string& name, size_t size) {
  const int file = shm_open(("/" + name).c_str(), O_CREAT | O_RDWR, 0600);
  if (file < 0) throw unusable(name);
  // A byte behind the end makes the file large enough and, unlike ftruncate, never shorter for who
  // has it open.
  const bool grown = pwrite(file, "", 1, static_cast<off_t>(size)) == 1;
  void* const start =
      grown ? mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0) : MAP_FAILED;
  const int error = errno;
  close(file);
  errno = error;
  if (start == MAP_FAILED) throw unusable(name);
  return start;
}

int checked(int ranks) {
  if (ranks >= 1 && ranks <= kMaxRanks) return ranks;
  throw Fault(kParameter, "softnpu: communicator of " + std::to_string(ranks) +
                              " ranks, expected 1 to " + std::to_string(kMaxRanks));
}

}  // namespace

// A process that has ended but was not waited for yet is as gone as one that does not exist.
bool running(int pid) {
  if (kill(pid, 0) != 0 && errno == ESRCH) return false;
  char path[64], text[512] = {};
  std::snprintf(path, sizeof path, "/proc/%d/stat", pid);
  std::FILE* file = std::fopen(path, "r");
  if (!file) return errno != ENOENT;
  const size_t length = std::fread(text, 1, sizeof text - 1, file);
  std::fclose(file);
  const char* end = length ? std::strrchr(text, ')') : nullptr;
  return end && end[1] == ' ' && end[2] != 'Z' && end[2] != 'X';
}

Segment::Segment(std::string segment_name, int rank_count)
    : name(std::move(segment_name)), ranks(checked(rank_count)) {
  const size_t pairs = static_cast<size_t>(ranks) * static_cast<size_t>(ranks);
  size_ = sizeof(Header) + static_cast<size_t>(ranks) * kSlot + pairs * sizeof(Mailbox);
  header_ = static_cast<Header*>(map(name, size_));
  boxes_ = reinterpret_cast<Mailbox*>(header_ + 1);
  slots_ = reinterpret_cast<unsigned char*>(boxes_ + pairs);
  int32_t others = 0;
  if (header_->ranks.compare_exchange_strong(others, ranks) || others == ranks) return;
  munmap(header_, size_);
  throw Fault(kParameter, "softnpu: communicator " + name + " has " + std::to_string(ranks) +
                              " ranks here and " + std::to_string(others) + " in another process");
}

Segment::~Segment() { munmap(header_, size_); }

void Segment::unlink() const { shm_unlink(("/" + name).c_str()); }

bool Segment::lost(int rank) const {
  const int pid = header_->pids[rank];
  return pid && !header_->left[rank] && !running(pid) &&
         !header_->left[rank];  // it may leave while we look
}

std::string Segment::absence(int rank) const {
  const std::string text = "rank " + std::to_string(rank) + " (process " +
                           std::to_string(header_->pids[rank]) + ") of communicator " + name;
  if (header_->left[rank]) return text + " has left: it destroyed its communicator or ended";
  return lost(rank) ? text + " is gone" : "";
}

}  // namespace softnpu::hccl
