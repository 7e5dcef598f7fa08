// MC2: MoeDistributeDispatch and Combine, V2 to V4. Rows of tokens go to the ranks of their experts
// and come back. Pages: mirror-cann/ops-transformer mc2/moe_distribute_{dispatch,combine}_v2/docs.
#pragma once

#include <functional>
#include <memory>
#include <utility>

#include "check.h"

namespace softnpu {

namespace hccl {
class Comm;
}

// An attribute that all ranks must give alike, by its name in the documents.
using Said = std::vector<std::pair<const char*, std::string>>;

// What both operators are told, and what follows from it.
struct Mc2 {
  std::string group_ep;
  int64_t ep_world_size, ep_rank_id, moe_expert_num;
  std::string group_tp;
  int64_t tp_world_size, tp_rank_id, expert_shard_type, shared_expert_num, shared_expert_rank_num,
      global_bs;
  std::string comm_alg;
  int64_t zero_expert_num, copy_expert_num, const_expert_num;
  FIELDS(domain, group_ep, ep_world_size, ep_rank_id, moe_expert_num, group_tp, tp_world_size,
         tp_rank_id, expert_shard_type, shared_expert_num, shared_expert_rank_num)
  FIELDS(specials, zero_expert_num, copy_expert_num, const_expert_num)

  int version;                       // of the name, 2 to 4
  int64_t bs, k, h;                  // rows of this rank, experts of each, width
  std::shared_ptr<hccl::Comm> comm;  // found by check_domain

  int64_t local_experts() const { return moe_expert_num / ep_world_size; }
  int64_t max_bs() const { return global_bs ? global_bs / ep_world_size : bs; }
  int64_t most_rows() const {  // that a rank may receive
    return max_bs() * ep_world_size * std::min(local_experts(), k);
  }
  std::string name(const char* operation) const;

  // Sets bs, k, h and comm; refuses what the pages exclude on this chip. Phase 1.
  void check_domain(In expert_ids, int64_t width, bool dispatch);
  void check_mask(In mask) const;
  Said said() const;

  // On the stream's thread.
  void together(const char* operation, const Said& said,
                const std::function<void()>& exchange) const;
  at::Tensor active(In mask) const;       // [bs, k] of bool
  at::Tensor gathered(In numbers) const;  // int64 [n] of every rank -> [ranks, n]
  // Rows [sum(sent), ...] in the order of the ranks they go to -> those for this rank, by sender.
  at::Tensor exchanged(In rows, In sent, In received) const;
  void failed(const std::string& why) const;  // here: then everywhere

 private:
  void check_algorithm(bool dispatch, bool hierarchy) const;
  void check_experts(bool dispatch, bool hierarchy) const;
  void check_sizes(bool dispatch) const;
  void check_buffer(bool dispatch) const;
  void find_communicator();
};

// What dispatch leaves for combine in assistInfoForCombine. No document says what lies there: the
// pages forbid to read it. A head, then for each row the rank, the token and the choice it is of.
inline constexpr int64_t kAssistHead = 16, kAssistOfRow = 3, kAssistWidth = 128;
std::vector<std::pair<const char*, int64_t>> assist_head(const Mc2& mc2);  // without the row count

}  // namespace softnpu
