// A communicator: one shared-memory segment for the local processes of a group. Zero bytes are its valid first state.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

namespace softnpu {

inline constexpr int kMaxRanks = 64;
inline constexpr size_t kSlot = size_t{1} << 20;  // a rank's bytes of one collective's round
inline constexpr size_t kBox = size_t{64} << 10;  // bytes on the way between one ordered pair of ranks

// What all ranks must say alike of one collective; -1: may differ.
struct Agreement {
  char call[24];
  int64_t count, dtype, operation, root;
};

struct Mailbox {
  std::atomic<uint64_t> produced, consumed;
  uint64_t length;  // bytes of the whole message, written with its first piece
  unsigned char data[kBox];
};

struct Segment {
  std::atomic<int32_t> pids[kMaxRanks];
  std::atomic<uint64_t> rounds[kMaxRanks];             // barriers that each rank has entered
  std::atomic<uint64_t> counts[kMaxRanks][kMaxRanks];  // bytes that row sends to column in this all-to-all
  Agreement calls[2][kMaxRanks];                       // of this collective and, from faster ranks, the next
  std::atomic<int32_t> failing, failed;  // first rank that failed, plus one; `failed` when the text is there
  char failure[512];
};

// One transfer of a group of sends and receives.
struct Transfer {
  bool send;
  unsigned char* data;
  size_t bytes;
  int peer;
  size_t done = 0;
};

struct Piece {  // where a rank's part lies in a local buffer
  unsigned char* data;
  size_t bytes;
};

class Comm {
 public:
  Comm(std::string name, int ranks, int rank);
  ~Comm();
  Comm(const Comm&) = delete;

  void agree(const Agreement& mine);      // first step of every collective
  void fail_all(const std::string& why);  // every rank fails, now and later
  void barrier();
  void all_reduce(const void* send, void* receive, size_t count, int dtype, int operation,
                  int root);  // root -1: every rank keeps it
  void broadcast(void* data, size_t bytes, int root);
  void exchange(const std::vector<Piece>& send, const std::vector<Piece>& receive);  // all to all, uneven
  void all_gather(const void* send, size_t bytes, const std::vector<Piece>& receive);
  void reduce_scatter(const void* send, void* receive, size_t count, int dtype, int operation);
  void transfer(std::vector<Transfer> transfers);

  const std::string name;
  const int ranks, rank;
  std::atomic<int> error{0};

 private:
  template <class Ready>
  void wait(const std::vector<int>& peers, Ready ready);
  void check_failed();
  int gone(const std::vector<int>& peers) const;  // a rank whose process has ended, or -1
  void join();
  bool progress(Transfer& transfer);
  unsigned char* slot(int of) const { return slots_ + static_cast<size_t>(of) * kSlot; }
  Mailbox& box(int from, int to) const { return boxes_[from * ranks + to]; }

  std::vector<int> everyone_;
  uint64_t collectives_ = 0;
  Segment* segment_;
  unsigned char* slots_;
  Mailbox* boxes_;
  size_t size_;
};

size_t element_size(int dtype);

}  // namespace softnpu
