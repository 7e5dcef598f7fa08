// The shared memory of one communicator's local processes. Zero bytes are its valid first state.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

namespace softnpu::hccl {

inline constexpr int kMaxRanks = 64;
inline constexpr size_t kSlot = size_t{1} << 20;  // a rank's bytes of one collective's round
inline constexpr size_t kBox = size_t{64}
                               << 10;  // bytes on the way between one ordered pair of ranks

// What all ranks must say alike of one collective; -1: may differ.
struct Agreement {
  char call[32];
  int64_t count, dtype, operation, root;
};

struct Mailbox {
  std::atomic<uint64_t> produced, consumed;
  uint64_t length;  // bytes of the whole message, written with its first piece
  unsigned char data[kBox];
};

struct Header {
  std::atomic<int32_t> ranks;
  std::atomic<int32_t> pids[kMaxRanks];
  std::atomic<bool> left[kMaxRanks];        // in good order: a process that ends otherwise is lost
  std::atomic<uint64_t> rounds[kMaxRanks];  // barriers that each rank has entered
  std::atomic<uint64_t> counts[kMaxRanks]
                              [kMaxRanks];  // bytes that row sends to column in this all-to-all
  Agreement calls[2][kMaxRanks];            // of this collective and, from faster ranks, the next
  std::atomic<int32_t> failing,
      failed;  // first rank that failed, plus one; `failed` when the text is there
  char failure[512];
};

class Segment {
 public:
  Segment(std::string name, int ranks);  // opens it, or creates it for who comes later
  ~Segment();
  Segment(const Segment&) = delete;

  void unlink() const;  // who has it open keeps it
  Header& header() const { return *header_; }
  unsigned char* slot(int rank) const { return slots_ + static_cast<size_t>(rank) * kSlot; }
  Mailbox& box(int from, int to) const { return boxes_[from * ranks + to]; }
  bool lost(int rank) const;            // joined, and its process has ended without leaving
  std::string absence(int rank) const;  // why it will do nothing more here; "" while it may

  const std::string name;
  const int ranks;

 private:
  size_t size_;
  Header* header_;
  Mailbox* boxes_;
  unsigned char* slots_;
};

bool running(int pid);

}  // namespace softnpu::hccl
