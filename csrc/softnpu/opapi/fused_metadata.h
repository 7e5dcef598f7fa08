// Metadata tensors i32 [1024]. What CANN's operators write there depends on lengths and attributes,
// and an attention that runs with metadata of others is undefined. Here they hold a fingerprint of
// each argument, which the attention compares with its own: a kernel fault names what differs.
#pragma once

#include "fused_paged.h"

namespace softnpu::paged {

class Fingerprint {
 public:
  explicit Fingerprint(const char* reader);  // the operator that the metadata is for
  void add(const char* name, int64_t value) { items_.push_back({name, hashed({value})}); }
  void add(const char* name, const std::string& value);
  void add_lengths(const char* name, In x);  // reads them: only in kernels
  void store(const Out& metadata) const;
  void expect(In metadata) const;

 private:
  struct Item {
    const char* name;
    int hash;
  };
  static int hashed(const std::vector<int64_t>& values);
  const char* reader_;
  std::vector<Item> items_;
};

void check_metadata(In metadata);

}  // namespace softnpu::paged
