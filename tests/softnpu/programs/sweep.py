"""Every call of a decode step fails once: an error that names the call, no leak, and the next step right.

One leak is torch_npu's own: when phase 1 or 2 of an operator fails it never destroys that call's arguments. Run with TASK_QUEUE_ENABLE=0: with the queue on, an error in phase 2 poisons the process (docs/softnpu.md).
"""

import contextlib
import os
import sys
import tempfile

import torch
import torch_npu  # noqa: F401
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from dsv4_backend.softnpu import current

device = current()
# Not every synchronise of torch_npu passes on softnpu's text; it is on stderr always.
log = tempfile.TemporaryFile("w+b")  # noqa: SIM115  (open until the process ends)
os.dup2(log.fileno(), 2)


def said(since):
    """What was written to stderr behind a position."""
    return os.pread(2, 1 << 20, since).decode(errors="replace")


torch.manual_seed(0)
model = Qwen3MoeForCausalLM(Qwen3MoeConfig(
    vocab_size=31, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)).eval().to("npu")  # fmt: skip
prompt, token = torch.tensor([[1, 2, 3]]).npu(), torch.tensor([[4]]).npu()


@torch.no_grad()
def step():
    torch.npu.empty_cache()
    cache = model(prompt, use_cache=True).past_key_values
    out = model(token, past_key_values=cache).logits
    torch.npu.synchronize()
    return out.cpu()


IN_FLIGHT = ("tensors", "tensor_lists", "scalars", "arrays", "executors")
want = step()
before = device.statistics()["calls"]
step()
used = sorted(name for name, count in device.statistics()["calls"].items() if count > before.get(name, 0))
# Creators answer an object, not a code; questions whose code torch_npu ignores.
calls = [name for name in used if not name.startswith("aclCreate")]
kernels = [f"{name}@kernel" for name in used if name.startswith("aclnn") and not name.endswith("WorkspaceSize")]
problems, silent, leaking = [], [], 0
alive = {key: device.alive()[key] for key in IN_FLIGHT}
for name in calls + kernels:
    device.inject(f"{name}:1:{507015 if '@' in name else 161002 if name.startswith('aclnn') else 107000}")
    since = os.lseek(2, 0, os.SEEK_END)
    try:
        step()
        silent.append(name)
    except RuntimeError as error:
        named = {"aclrtSynchronizeStream": "stream synchronize"}.get(
            name, name.split("@")[0].removesuffix("GetWorkspaceSize")
        )
        if named not in str(error) + said(since):
            problems.append(f"{name}: not named in: {str(error)[:200]}")
    device.inject("")
    with contextlib.suppress(RuntimeError):
        torch.npu.synchronize()
    left = {key: device.alive()[key] - count for key, count in alive.items()}
    alive = {key: device.alive()[key] for key in IN_FLIGHT}
    operator_call = name.startswith("aclnn") and "@" not in name
    leaking += operator_call and any(left.values())
    if left["executors"] or (any(left.values()) and not operator_call):
        problems.append(f"{name}: leaks {left}")
    if not torch.equal(step(), want):
        problems.append(f"{name}: the next step is wrong")
print(
    f"sweep: {len(calls)} calls and {len(kernels)} kernels failed once each, ignored by torch_npu: {silent}, arguments left by torch_npu: {leaking}"
)
for problem in problems:
    print("PROBLEM", problem)
sys.exit(bool(problems))
