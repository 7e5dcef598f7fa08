"""Imports torch_npu and uses the device, with nothing of ours around it."""

import torch
import torch_npu  # noqa: F401  by itself, as a user's program does

print(torch.ones(3, device="npu").sum().item())
