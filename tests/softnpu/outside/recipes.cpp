// Names by which cann-recipes-infer's library is told from vllm-ascend's, which has aclnnHcPre too:
// test_vendors.py builds it beside the gate, whose arguments are the same in both packages.
#include "softnpu/opapi/op.h"

namespace softnpu {

OP(aclnnHcPre, [](In, Out) { throw Fault(kKernelFault, "aclnnHcPre is not emulated here"); })
OP(aclnnScatterNdUpdateAsc,
   [](In, Out) { throw Fault(kKernelFault, "aclnnScatterNdUpdateAsc is not emulated here"); })

}  // namespace softnpu
