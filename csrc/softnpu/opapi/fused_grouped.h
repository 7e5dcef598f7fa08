// What the grouped products share: groups of rows, scales, and the forms (combinations of dtypes)
// of grouped_matmul.
#pragma once

#include <algorithm>

#include "check.h"
#include "matrix.h"

namespace softnpu::grouped {

using Shapes = std::vector<std::vector<int64_t>>;

struct Group {
  int64_t expert, start, end;
};
// group_list_type 0: ends, 1: counts, 2: pairs of expert and count.
std::vector<Group> read_groups(In list, int64_t type, int64_t length);

at::Tensor product(In x, In weight);  // integers without rounding; the result is fp32 or fp64
at::Tensor stretch(In scale, int64_t block, int64_t dim,
                   int64_t size);  // each scale repeated for its block
at::Tensor mx_rows(In scale);      // [rows, K/64, 2] -> [rows, K/32] in fp32
at::Tensor mx_columns(In scale);   // [K/64, columns, 2] -> [K/32, columns] in fp32
at::Tensor low_float(In scale);    // the fp32 in the low half of 64 bits; fp32 itself otherwise
at::Tensor swiglu_of(In both);     // swish of the first half by the second
bool given(Ins list);
void require_shape(const char* argument, In x, const Shapes& allowed);

// The rows of a table for this chip and this layout of the weight.
template <class Row>
std::vector<const Row*> rows_here(const std::vector<Row>& table, bool nz) {
  std::vector<const Row*> rows;
  for (const Row& row : table)
    if (here(row.where) && row.layouts & (nz ? 2U : 1U)) rows.push_back(&row);
  return rows;
}

// How a form is computed.
enum class Kind {
  kPlain,
  kScaled,     // integers or FP8 with a scale of the weight, and one of x
  kMx,         // E8M0 scales of 32 values along K on both sides
  kMsd,        // int8 by int4, scales of groups along K, bias made offline
  kInt4,       // int4 by int4
  kAntiquant,  // float x, integer, FP8 or FP4 weight
  kMxW4,       // FP8 with E8M0 scales by FP4 with E8M0 scales
  kKcg,        // int8 by int4, scales of groups along K and of the columns
};
enum Layout : unsigned { kNd = 1, kNz = 2 };
enum Axis : unsigned { kApart = 1, kRows = 2, kDepth = 4 };  // group_type -1, 0, 2

struct Form {
  Source source;
  unsigned where, layouts, axes;
  Kind kind;
  Types x, weight, bias, scale, offset, antiquant_scale, antiquant_offset, per_token, out;
};

struct Grouped {  // V4, V5 and the one for the NZ format
  std::vector<Matrix> x, weight;
  std::vector<at::Tensor> bias, scale, offset, antiquant_scale, antiquant_offset, per_token;
  at::Tensor list;
  std::vector<at::Tensor> activation, activation_scale, activation_offset;
  int64_t split, type, list_type, act;
  std::vector<int64_t> tuning;
  int64_t quant_group;
  std::vector<Out> out, activation_feature, dynamic_scale;

  FIELDS(tensors, x, weight, bias, scale, offset, antiquant_scale, antiquant_offset, per_token,
         list, activation, activation_scale, activation_offset, split, type, list_type, act)
  FIELDS(tuned, tuning)
  FIELDS(grouped, quant_group)
  FIELDS(results, out, activation_feature, dynamic_scale)
  auto v4() { return tensors() + results(); }
  auto v5() { return tensors() + tuned() + results(); }
  auto weight_nz() { return tensors() + tuned() + grouped() + results(); }

  bool nz() const { return !weight.empty() && weight[0].nz; }
  int64_t rows() const;  // of all x together
  int64_t groups() const;
  int64_t depth() const { return x[0].size(-1); }
  int64_t columns() const { return weight[0].size(-1); }
  Grouped opened() const;  // 32 bits that hold 4-bit values as those
  void check() const;
  void check_nz() const;
  void run() const;
};

const Form& form_of(const Grouped& call);  // refuses what no row of the table describes
bool blockwise(const Grouped& call);       // FP8 with scales of blocks of 128
void check_grouped(const Grouped& call);

}  // namespace softnpu::grouped
