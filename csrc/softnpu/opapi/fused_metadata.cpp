#include "fused_metadata.h"

#include <ATen/ops/zeros.h>

namespace softnpu::paged {
namespace {
constexpr int64_t kSize = 1024;
constexpr size_t kHead = 2;  // the operator, the number of items
}  // namespace

Fingerprint::Fingerprint(const char* reader) : reader_(reader) {}

int Fingerprint::hashed(const std::vector<int64_t>& values) {  // FNV-1a
  uint64_t hash = 14695981039346656037U;
  for (const int64_t value : values)
    for (int shift = 0; shift < 64; shift += 8)
      hash = (hash ^ ((static_cast<uint64_t>(value) >> shift) & 255)) * 1099511628211U;
  return static_cast<int>(static_cast<uint32_t>(hash ^ (hash >> 32)));
}

void Fingerprint::add(const char* name, const std::string& value) {
  items_.push_back({name, hashed({value.begin(), value.end()})});
}

void Fingerprint::add_lengths(const char* name, In x) {
  auto values = values_of(x);
  values.push_back(static_cast<int64_t>(values.size()));
  items_.push_back({name, hashed(values)});
}

void Fingerprint::store(const Out& metadata) const {
  const std::string reader = reader_;
  at::Tensor words = at::zeros({kSize}, at::kInt);
  int* word = words.mutable_data_ptr<int>();
  word[0] = hashed({reader.begin(), reader.end()});
  word[1] = static_cast<int>(items_.size());
  for (size_t i = 0; i < items_.size(); ++i) word[kHead + i] = items_[i].hash;
  metadata = words;
}

void Fingerprint::expect(In metadata) const {
  const at::Tensor words = metadata.contiguous();
  const int* word = words.const_data_ptr<int>();
  const std::string reader = reader_;
  if (word[0] != hashed({reader.begin(), reader.end()}) ||
      word[1] != static_cast<int>(items_.size()))
    fault("metadata", "not what " + reader + "Metadata writes");
  for (size_t i = 0; i < items_.size(); ++i)
    if (word[kHead + i] != items_[i].hash)
      fault("metadata", std::string("made for another ") + items_[i].name + " than this call's");
}

void check_metadata(In metadata) {
  require(metadata.numel() == kSize && metadata.is_contiguous(), "metadata", show(metadata),
          "[1024], contiguous");
}

}  // namespace softnpu::paged
