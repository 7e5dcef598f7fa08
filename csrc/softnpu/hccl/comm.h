// One rank of a communicator: collectives and messages over its shared memory.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "segment.h"
#include "softnpu/acl/abi.h"

namespace softnpu::hccl {

// One transfer of a group of sends and receives. A send ends when its receiver has taken it.
struct Transfer {
  bool send;
  unsigned char* data;
  size_t bytes;
  int peer;
  size_t moved = 0;
  bool done = false;
};

struct Piece {  // where a rank's part lies in a local buffer
  unsigned char* data;
  size_t bytes;
};

class SOFTNPU_CXX Comm {
 public:
  Comm(const std::shared_ptr<Segment>& segment, int rank);  // waits for the others
  ~Comm();                                                  // leaves in good order
  Comm(const Comm&) = delete;

  void collective(const Agreement& mine,
                  const std::function<void()>& run);  // all ranks say the same of it first
  void fail_all(const std::string& why);              // every rank fails, now and later
  void all_reduce(const void* send, void* receive, size_t count, int dtype, int operation,
                  int root);  // root -1: every rank keeps it
  void broadcast(void* data, size_t bytes, int root);
  void exchange(const std::vector<Piece>& send,
                const std::vector<Piece>& receive);  // all to all, uneven
  void all_gather(const void* send, size_t bytes, const std::vector<Piece>& receive);
  void reduce_scatter(const std::vector<Piece>& send, void* receive, int dtype, int operation);
  void transfer(std::vector<Transfer> transfers);

  void leave();                   // in good order; not from a forked child
  std::string lost_peer() const;  // "" while there is none

  const std::string& name;
  const int ranks, rank;
  std::atomic<int> error{0};

 private:
  // Until `ready`, or a Fault when one of the peers is gone; `what` names what is waited for.
  void wait(const std::vector<int>& peers, const std::function<bool()>& ready,
            const std::function<std::string()>& what);
  void check_failed();
  void take_rank();
  void join();
  void agree(const Agreement& mine);
  void barrier();
  bool progress(Transfer& transfer);
  void finish(std::vector<Transfer>& transfers);
  std::string told(const Transfer& transfer) const;
  unsigned char* slot(int of) const { return segment_->slot(of); }

  const std::shared_ptr<Segment> segment_;
  Header& header_;
  std::vector<int> everyone_;
  std::mutex collective_mutex_;  // streams take turns
  uint64_t collectives_ = 0;
};

}  // namespace softnpu::hccl
