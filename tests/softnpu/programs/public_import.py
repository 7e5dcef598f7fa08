"""Imports torch_npu and uses the device, with nothing of ours around it."""

import torch
import torch_npu

# No device was set: aclInit's file names the default one, which memory of the host needs too.
swapped = torch_npu.empty_with_swapped_memory([3], dtype=torch.float32, device="npu:0")
print((swapped.fill_(1) + torch.zeros(3, device="npu")).sum().item())
