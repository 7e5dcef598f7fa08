"""Several streams under chaos: the right program gives the same bits for every seed,
one with a wait removed is caught. `chaos.py SEEDS`.
"""

import sys

import torch
import torch_npu  # noqa: F401

from softnpu import current

device = current()
streams = [torch.npu.Stream() for _ in range(3)]
x = torch.arange(256.0, device="npu").view(16, 16) / 64


def program(with_waits):
    """A pipeline over three streams; each stage reads what the one before wrote."""
    stages = [torch.zeros_like(x) for _ in range(4)]
    torch.npu.synchronize()
    stages[0].copy_(x)
    for i, stream in enumerate(streams):
        if with_waits or i != 1:
            stream.wait_stream(streams[i - 1] if i else torch.npu.current_stream())
        with torch.npu.stream(stream):
            torch.add(stages[i] @ x, 1, out=stages[i + 1])
    torch.npu.current_stream().wait_stream(streams[-1])
    result = stages[3].sum(0).cpu()
    torch.npu.synchronize()
    return result


want = program(True)
right = caught = 0
for seed in range(1, int(sys.argv[1]) + 1):
    device.chaos(seed)
    right += torch.equal(program(True), want)
    caught += not torch.equal(program(False), want)
device.chaos(0)
print(f"chaos: {right} of {sys.argv[1]} seeds right, removed wait caught by {caught}")
sys.exit(right != int(sys.argv[1]) or not caught)
