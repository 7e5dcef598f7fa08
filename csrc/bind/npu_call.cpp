#include "npu_call.h"

#include <ATen/ops/empty.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>

namespace dsv4::bind {
npu::AclType acl_type(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return npu::AclType::f32;
    case at::kHalf:
      return npu::AclType::f16;
    case at::kBFloat16:
      return npu::AclType::bf16;
    case at::kChar:
      return npu::AclType::i8;
    case at::kByte:
      return npu::AclType::u8;
    case at::kInt:
      return npu::AclType::i32;
    case at::kLong:
      return npu::AclType::i64;
    case at::kBool:
      return npu::AclType::boolean;
    case at::kFloat8_e4m3fn:
      return npu::AclType::e4m3;
    case at::kFloat8_e8m0fnu:
      return npu::AclType::e8m0;
    default:
      throw std::logic_error("a launcher was given a dtype that its predicate does not admit");
  }
}

bool on_a5(const Context& context) {
  return npu::generation_of(context.machine.chip) == npu::Generation::a5;
}

NpuCall::NpuCall(const char* op, const at::Tensor& on)
    : guard_(on.device()),
      stream_(c10::impl::VirtualGuardImpl(on.device().type()).getStream(on.device())) {
  const auto options = at::TensorOptions().dtype(at::kByte).device(on.device());
  site_ = {op, &npu_context().machine, &stream_, [this, options](uint64_t bytes) {
             workspaces_.push_back(at::empty({static_cast<int64_t>(bytes)}, options));
             return workspaces_.back().mutable_data_ptr();
           }};
}

npu::View NpuCall::view(const at::Tensor& tensor) {
  return {tensor.storage().mutable_data(),
          static_cast<int64_t>(tensor.storage().nbytes() / tensor.element_size()),
          acl_type(tensor.scalar_type()),
          {tensor.sizes().data(), tensor.sizes().size()},
          {tensor.strides().data(), tensor.strides().size()},
          tensor.storage_offset()};
}

WhyNot not_of(const char* name, const at::Tensor& tensor,
              std::initializer_list<at::ScalarType> types) {
  if (std::find(types.begin(), types.end(), tensor.scalar_type()) != types.end()) {
    return std::nullopt;
  }
  std::string expected;
  for (const at::ScalarType type : types) {
    expected += (expected.empty() ? "" : " or ") + std::string(c10::toString(type));
  }
  return std::string(name) + " is " + c10::toString(tensor.scalar_type()) +
         ", and the chip takes " + expected;
}

}  // namespace dsv4::bind
