#include "mc2.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include "softnpu/acl/number.h"
#include "softnpu/hccl/api.h"

namespace softnpu {
namespace {

constexpr int64_t kMega = 1 << 20, kDefaultBuffer = 200;  // MB of HCCL_BUFFSIZE
constexpr int64_t kMaxInt32 = (int64_t{1} << 31) - 1;
constexpr size_t kTextBytes = 1024;  // of what one rank says
constexpr std::string_view kAlgorithms[] = {"", "fullmesh", "fullmesh_v1", "fullmesh_v2"};
constexpr int64_t kA2Ranks[] = {2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128, 192, 256, 384};

int64_t aligned(int64_t value, int64_t unit) { return ceil_div(value, unit) * unit; }

std::string environment(const char* variable) {
  const char* const value = std::getenv(variable);
  return value ? value : "";
}

void not_emulated(bool used, const char* argument, const std::string& found) {
  require(!used, argument, found + ", which is not emulated", "another one");
}

std::vector<size_t> bytes_of(In counts, size_t width) {
  std::vector<size_t> result;
  for (int64_t rank = 0; rank < counts.numel(); ++rank)
    result.push_back(static_cast<size_t>(counts[rank].item<int64_t>()) * width);
  return result;
}

std::vector<hccl::Piece> pieces(In rows, const std::vector<size_t>& bytes) {
  std::vector<hccl::Piece> result;
  auto* data = static_cast<unsigned char*>(rows.data_ptr());
  for (const size_t part : bytes) {
    result.push_back({data, part});
    data += part;
  }
  return result;
}

}  // namespace

std::string Mc2::name(const char* operation) const {
  return std::string("aclnnMoeDistribute") + operation + "V" + text(version);
}

void Mc2::check_algorithm(bool dispatch, bool hierarchy) const {
  const bool newer = version > 2;  // V2 takes none on A3 and A5, by its pages
  const bool known =
      comm_alg.empty() || (comm_alg == "hierarchy" && (here(kOnA2) || (here(kOnA3) && newer))) ||
      (comm_alg == "fullmesh" && here(kOnA2)) ||
      ((comm_alg == "fullmesh_v1" || comm_alg == "fullmesh_v2") && !here(kOnA2) && newer);
  require(known, "commAlg", '"' + comm_alg + '"',
          here(kOnA2)   ? "\"\", \"fullmesh\" or \"hierarchy\""
          : !newer      ? "\"\", as this version has no other on this chip"
          : here(kOnA3) ? "\"\", \"fullmesh_v1\", \"fullmesh_v2\" or \"hierarchy\""
                        : "\"\", \"fullmesh_v1\" or \"fullmesh_v2\"");
  const int64_t n = ep_world_size;
  if (hierarchy) {
    require(
        here(kOnA2) ? n == 16 || n == 32 || n == 64 : n >= 16 && n <= 256 && n % 16 == 0,
        "epWorldSize", text(n),
        here(kOnA2) ? "16, 32 or 64 for hierarchy" : "a multiple of 16 up to 256 for hierarchy");
  } else if (here(kOnA2)) {
    require(std::find(std::begin(kA2Ranks), std::end(kA2Ranks), n) != std::end(kA2Ranks),
            "epWorldSize", text(n), "2 to 8, 16, 32, 64, 128, 192, 256 or 384");
  } else {
    const int64_t most = on_a5() && dispatch && newer ? 1024 : 768;
    require(n >= 2 && n <= most, "epWorldSize", text(n), ("2 to " + text(most)).c_str());
  }
}

void Mc2::check_experts(bool dispatch, bool hierarchy) const {
  const int64_t most = hierarchy || (here(kOnA2) && !dispatch) ? 512 : 1024;
  require(moe_expert_num > 0 && moe_expert_num <= most, "moeExpertNum", text(moe_expert_num),
          ("1 to " + text(most)).c_str());
  // Before CANN takes shared experts on A2, torch_npu's default of one passes: our reading.
  const int64_t shared = here(kOnA2) ? 1 : 4;
  require(shared_expert_num >= 0 && shared_expert_num <= shared, "sharedExpertNum",
          text(shared_expert_num), ("0 to " + text(shared)).c_str());
  const int64_t ranks = here(kOnA2) ? 1 : ep_world_size;
  require(shared_expert_rank_num >= 0 && shared_expert_rank_num < ranks, "sharedExpertRankNum",
          text(shared_expert_rank_num),
          here(kOnA2) ? "0 on this chip" : "0 to less than epWorldSize");
  require(shared_expert_rank_num
              ? shared_expert_num > 0 && shared_expert_rank_num % shared_expert_num == 0
              : shared_expert_num <= 1,
          "sharedExpertNum", text(shared_expert_num) + " on " + text(shared_expert_rank_num),
          "0 or 1 without ranks of its own, or a divisor of them");
  require(moe_expert_num % (ep_world_size - shared_expert_rank_num) == 0, "moeExpertNum",
          text(moe_expert_num), "a multiple of the ranks that have experts");
  not_emulated(shared_expert_rank_num > 0, "sharedExpertRankNum", text(shared_expert_rank_num));
  require(here(kOnA2) || local_experts() * ep_world_size <= 2048, "moeExpertNum",
          text(moe_expert_num), "at most 2048 in all");
  require(expert_shard_type == 0, "expertShardType", text(expert_shard_type), "0");
  for (const auto& [what, number] :
       {std::pair("zeroExpertNum", zero_expert_num), std::pair("copyExpertNum", copy_expert_num),
        std::pair("constExpertNum", const_expert_num)}) {
    require(number >= 0 && number < kMaxInt32, what, text(number), "0 to less than 2^31 - 1");
    not_emulated(number > 0, what, text(number));
  }
}

void Mc2::check_sizes(bool dispatch) const {
  const bool second = comm_alg == "fullmesh_v2";
  const int64_t rows = here(kOnA2) || (here(kOnA3) && second) ? 256 : 512;
  require(bs > 0 && bs <= rows, "BS", text(bs), ("1 to " + text(rows)).c_str());
  const int64_t choices = second && dispatch ? 12 : 16;
  require(k > 0 && k <= choices && k <= moe_expert_num, "K", text(k),
          ("1 to " + text(choices) + " and to moeExpertNum").c_str());
  if (here(kOnA2)) {
    const int64_t most = dispatch ? 10240 : 7168;
    require(h > 0 && h <= most && h % 32 == 0, "H", text(h),
            ("a multiple of 32 up to " + text(most)).c_str());
  } else {
    require(h >= 1024 && h <= 8192, "H", text(h), "1024 to 8192");
  }
  require(global_bs == 0 || (global_bs % ep_world_size == 0 && global_bs / ep_world_size >= bs),
          "globalBS", text(global_bs), "0, or epWorldSize times the largest BS of a rank");
}

// Twice what is exchanged must fit into the communicator's buffer.
void Mc2::check_buffer(bool dispatch) const {
  const std::string set = environment("HCCL_BUFFSIZE");
  int64_t megabytes = kDefaultBuffer;
  require(set.empty() || (number(set, &megabytes) && megabytes > 0), "HCCL_BUFFSIZE", set,
          "a number of MB");
  int64_t needed = 0;
  if (here(kOnA2)) {
    needed = 2 * (most_rows() * h * 2 + 2 * kMega);
  } else {
    const int64_t row = aligned(2 * h, 32) + (dispatch ? 64 : 44);
    const int64_t slot = comm_alg == "fullmesh_v2" ? ceil_div(row, 480) * 512 : aligned(row, 512);
    needed = 2 * (local_experts() * max_bs() * ep_world_size * slot +
                  (k + shared_expert_num) * max_bs() * aligned(2 * h, 512));
  }
  require(megabytes * kMega >= needed, "HCCL_BUFFSIZE", text(megabytes) + " MB",
          ("at least " + text(ceil_div(needed, kMega)) + " MB for these sizes").c_str());
}

// That its rank is the one of the communicator is our reading: rows go by one and come by the
// other.
void Mc2::find_communicator() {
  require(!group_ep.empty() && group_ep.size() < 128, "groupEp", '"' + group_ep + '"',
          "1 to 127 characters");
  require(group_ep != group_tp, "groupTp", '"' + group_tp + '"', "another name than groupEp");
  comm = hccl::find_named(group_ep);
  require(comm != nullptr, "groupEp", '"' + group_ep + '"',
          "the name of a communicator of this process (HcclGetCommName)");
  require(ep_world_size == comm->ranks, "epWorldSize", text(ep_world_size),
          (text(comm->ranks) + ", the ranks of " + group_ep).c_str());
  require(ep_rank_id == comm->rank, "epRankId", text(ep_rank_id),
          (text(comm->rank) + ", this process's rank of " + group_ep).c_str());
}

void Mc2::check_domain(In expert_ids, int64_t width, bool dispatch) {
  bs = expert_ids.size(0), k = expert_ids.size(1), h = width;
  const bool by_variables =
      environment("HCCL_INTRA_PCIE_ENABLE") == "1" && environment("HCCL_INTRA_ROCE_ENABLE") == "0";
  const bool hierarchy =
      comm_alg == "hierarchy" || (here(kOnA2) && comm_alg.empty() && by_variables);
  check_algorithm(dispatch, hierarchy);
  require(ep_rank_id >= 0 && ep_rank_id < ep_world_size, "epRankId", text(ep_rank_id),
          "0 to less than epWorldSize");
  const int64_t tp = here(kOnA3) ? 2 : 1;  // the pages want 0 elsewhere, their examples pass 1
  require(tp_world_size >= 0 && tp_world_size <= tp, "tpWorldSize", text(tp_world_size),
          ("0 to " + text(tp)).c_str());
  not_emulated(tp_world_size == 2, "tpWorldSize", "2");
  require(tp_rank_id == 0, "tpRankId", text(tp_rank_id), "0 without a TP domain");
  check_experts(dispatch, hierarchy);
  not_emulated(hierarchy, "commAlg", "hierarchy");
  check_sizes(dispatch);
  check_buffer(dispatch);
  find_communicator();
}

void Mc2::check_mask(In mask) const {
  if (!mask.defined()) return;
  const bool fits = mask.size(0) == bs && (mask.dim() == 1 || mask.size(1) == k);
  require(fits && (mask.dim() == 1 || !here(kOnA2)), "xActiveMask", show(mask),
          here(kOnA2) ? "[BS]" : "[BS] or [BS, K]");
}

Said Mc2::said() const {
  return {{"moeExpertNum", text(moe_expert_num)},
          {"globalBS", text(global_bs)},
          {"sharedExpertNum", text(shared_expert_num)},
          {"tpWorldSize", text(tp_world_size)},
          {"groupTp", group_tp},
          {"commAlg", comm_alg},
          {"HCCL_BUFFSIZE", environment("HCCL_BUFFSIZE")},
          {"K", text(k)},
          {"H", text(h)}};
}

void Mc2::together(const char* operation, const Said& said,
                   const std::function<void()>& exchange) const {
  hccl::Agreement call{{}, -1, -1, -1, -1};
  std::snprintf(call.call, sizeof call.call, "%s", name(operation).c_str());
  comm->collective(call, [&] {
    at::Tensor mine = at::empty({static_cast<int64_t>(kTextBytes)}, at::kByte).zero_();
    std::string line;
    for (const auto& [what, value] : said) line += value + "\n";
    if (line.size() >= kTextBytes) throw Fault(kKernelFault, "attributes of more than 1024 bytes");
    std::memcpy(mine.data_ptr(), line.data(), line.size());
    at::Tensor all = at::empty({comm->ranks, mine.numel()}, at::kByte);
    comm->all_gather(mine.data_ptr(), kTextBytes,
                     pieces(all, std::vector<size_t>(comm->ranks, kTextBytes)));
    std::vector<std::string> rest;  // of each rank's lines
    for (int rank = 0; rank < comm->ranks; ++rank)
      rest.emplace_back(static_cast<const char*>(all[rank].data_ptr()));
    for (const auto& [what, value] : said) {
      std::string first;
      for (int rank = 0; rank < comm->ranks; ++rank) {
        const size_t end = rest[rank].find('\n');
        const std::string theirs = rest[rank].substr(0, end);
        rest[rank].erase(0, end + 1);
        if (rank == 0) first = theirs;
        if (theirs != first)
          throw Fault(kKernelFault, std::string("ranks disagree on ") + what + ": rank 0 says \"" +
                                        first + "\", rank " + text(rank) + " \"" + theirs + '"');
      }
    }
    exchange();
  });
}

at::Tensor Mc2::active(In mask) const {
  if (!mask.defined()) return at::ones({bs, k}, at::kBool);
  if (mask.dim() == 2) return mask;
  const at::Tensor numbers = mask.to(at::kInt);
  if (numbers.diff().gt(0).any().item<bool>())
    throw Fault(kKernelFault,
                "argument 'xActiveMask': found true behind false, expected true before false");
  return mask.unsqueeze(1).expand({bs, k});
}

at::Tensor Mc2::gathered(In numbers) const {
  const at::Tensor mine = numbers.contiguous();
  at::Tensor all = at::empty({comm->ranks, mine.numel()}, at::kLong);
  comm->all_gather(mine.data_ptr(), mine.nbytes(),
                   pieces(all, std::vector<size_t>(comm->ranks, mine.nbytes())));
  return all;
}

at::Tensor Mc2::exchanged(In rows, In sent, In received) const {
  const at::Tensor from = rows.contiguous();
  std::vector<int64_t> sizes = from.sizes().vec();
  sizes[0] = received.sum().item<int64_t>();
  const at::Tensor to = at::empty(sizes, from.options());
  const auto width =
      static_cast<size_t>(c10::multiply_integers(from.sizes().slice(1))) * from.element_size();
  comm->exchange(pieces(from, bytes_of(sent, width)), pieces(to, bytes_of(received, width)));
  return to;
}

void Mc2::failed(const std::string& why) const { comm->fail_all(why); }

std::vector<std::pair<const char*, int64_t>> assist_head(const Mc2& mc2) {
  const auto* const known = std::find(std::begin(kAlgorithms), std::end(kAlgorithms), mc2.comm_alg);
  return {{"version", mc2.version},
          {"epWorldSize", mc2.ep_world_size},
          {"epRankId", mc2.ep_rank_id},
          {"moeExpertNum", mc2.moe_expert_num},
          {"sharedExpertNum", mc2.shared_expert_num},
          {"globalBS", mc2.max_bs() * mc2.ep_world_size},
          {"commAlg", known - std::begin(kAlgorithms)},
          {"BS", mc2.bs},
          {"K", mc2.k},
          {"H", mc2.h}};
}

}  // namespace softnpu
