// Messages. HcclSend and HcclRecv are synchronous: after a send the stream goes on when the
// receiver has taken it all, as HCCL's pages of HcclSend and HcclBatchSendRecv say.
#include <algorithm>
#include <cstring>

#include "comm.h"
#include "softnpu/acl/report.h"

namespace softnpu::hccl {

std::string Comm::told(const Transfer& t) const {
  return std::string(t.send ? "a message of " : "a message expected of ") +
         std::to_string(t.bytes) + " bytes from rank " + std::to_string(t.send ? rank : t.peer) +
         " to rank " + std::to_string(t.send ? t.peer : rank) + " of communicator " + name;
}

bool Comm::progress(Transfer& t) {
  Mailbox& mailbox = t.send ? segment_->box(rank, t.peer) : segment_->box(t.peer, rank);
  const bool full = mailbox.produced.load(std::memory_order_acquire) !=
                    mailbox.consumed.load(std::memory_order_acquire);
  if (full == t.send) return false;
  if (t.moved == t.bytes) return t.done = true;
  if (t.moved == 0 && t.send) mailbox.length = t.bytes;
  if (t.moved == 0 && mailbox.length != t.bytes)
    throw Fault(kParameter, "softnpu: rank " + std::to_string(t.peer) + " sends " +
                                std::to_string(mailbox.length) + " bytes to rank " +
                                std::to_string(rank) + ", which expects " +
                                std::to_string(t.bytes));
  const size_t now = std::min(kBox, t.bytes - t.moved);
  if (t.send)
    std::memcpy(mailbox.data, t.data + t.moved, now);
  else
    std::memcpy(t.data + t.moved, mailbox.data, now);
  (t.send ? mailbox.produced : mailbox.consumed).fetch_add(1, std::memory_order_release);
  t.moved += now;
  t.done = !t.send && t.moved == t.bytes;
  return true;
}

// Moves all of them as their peers come; two of one direction with one peer keep their order.
void Comm::finish(std::vector<Transfer>& transfers) {
  const auto first = [&](const Transfer& t) {
    return &t == &*std::find_if(transfers.begin(), transfers.end(), [&](const Transfer& other) {
      return other.peer == t.peer && other.send == t.send;
    });
  };
  while (!transfers.empty()) {
    std::vector<int> peers;
    for (const Transfer& t : transfers) peers.push_back(t.peer);
    wait(
        peers,
        [&] {
          bool moved = false;
          for (Transfer& t : transfers) moved |= first(t) && progress(t);
          return moved;
        },
        [&] { return told(transfers[0]); });
    std::erase_if(transfers, [](const Transfer& t) { return t.done; });
  }
}

void Comm::transfer(std::vector<Transfer> transfers) {
  std::erase_if(transfers, [](const Transfer& t) { return t.bytes == 0; });
  try {
    finish(transfers);
  } catch (const Fault&) {
    for (const Transfer& t : transfers)
      if (t.send && !error)
        notice_unreceived(told(t));  // of a communicator that failed, the fault is told
    throw;
  }
}

}  // namespace softnpu::hccl
