"""Every call of a decode step fails once: an error that names the call, no leak,
and the next step right. `sweep.py MODEL [STRIDE]`.

Each use of each function fails in turn (every STRIDE-th of them when given). One leak is
torch_npu's own: when phase 1 or 2 of an operator fails it never destroys that call's
arguments. Run with TASK_QUEUE_ENABLE=0: with the queue on, an error in phase 2 poisons the
process (csrc/softnpu/docs/device.md).
"""

import contextlib
import copy
import os
import sys
import tempfile

import torch
import torch_npu  # noqa: F401
from seeds import seed
from transformers import (
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from softnpu import current

device = current()
# Not every synchronise of torch_npu passes on softnpu's text; it is on stderr always.
log = tempfile.TemporaryFile("w+b")  # noqa: SIM115  (open until the process ends)
os.dup2(log.fileno(), 2)


def said(since):
    """What was written to stderr behind a position."""
    return os.pread(2, 1 << 20, since).decode(errors="replace")


common = dict(
    vocab_size=31,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    head_dim=8,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
)
MODELS = {
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**common, intermediate_size=16, num_key_value_heads=1, num_experts=4)
    ),
    "deepseek-v4": lambda: DeepseekV4ForCausalLM(
        DeepseekV4Config(
            **{**common, "num_hidden_layers": 3},
            q_lora_rank=8,
            o_lora_rank=8,
            o_groups=2,
            n_routed_experts=4,
            n_shared_experts=1,
            max_position_embeddings=64,
            sliding_window=4,
            index_n_heads=2,
            index_head_dim=8,
            index_topk=2,
            hc_sinkhorn_iters=2,
        )
    ),
}
torch.manual_seed(seed())
model = MODELS[sys.argv[1]]().eval().to("npu")
with torch.no_grad():
    prefilled = model(torch.arange(1, 10)[None].npu(), use_cache=True).past_key_values
token = torch.tensor([[4]]).npu()


@torch.no_grad()
def step(faults=""):
    """One decode step from the same prefix; the faults count from its first call."""
    cache = copy.deepcopy(prefilled)
    torch.npu.empty_cache()
    torch.npu.synchronize()
    used_before.update(device.statistics()["calls"])
    device.inject(faults)
    out = model(token, past_key_values=cache).logits
    torch.npu.synchronize()
    return out.cpu()


def code(name):
    return 507015 if "@" in name else 161002 if name.startswith("aclnn") else 107000


def named(name, text):
    """Does the text of the error say which call failed?"""
    spoken = {"aclrtSynchronizeStream": "stream synchronize"}
    return spoken.get(name, name.split("@")[0].removesuffix("GetWorkspaceSize")) in text


used_before = {}
IN_FLIGHT = ("tensors", "tensor_lists", "scalars", "arrays", "executors")
want = step()
assert torch.equal(step("none:1:1"), want)
uses = {
    name: count - used_before.get(name, 0) for name, count in device.statistics()["calls"].items()
}
uses |= {
    f"{name}@kernel": n
    for name, n in uses.items()
    if name.startswith("aclnn") and "Workspace" not in name
}
plan = [(name, n) for name, count in sorted(uses.items()) for n in range(1, count + 1)]
plan = plan[:: int([*sys.argv, "1"][2])]
problems, silent, leaking = [], [], 0
alive = {key: device.alive()[key] for key in IN_FLIGHT}
for name, n in plan:
    since = os.lseek(2, 0, os.SEEK_END)
    try:
        if not torch.equal(step(f"{name}:{n}:{code(name)}"), want):
            problems.append(f"{name} {n}: a wrong result without an error")
        silent.append(name)
    except RuntimeError as error:
        if not named(name, str(error) + said(since)):
            problems.append(f"{name} {n}: not named in: {str(error)[:200]}")
    if not device.statistics()["fired"]:
        problems.append(f"{name} {n}: did not fail")
    device.inject("")
    with contextlib.suppress(RuntimeError):
        torch.npu.synchronize()
    left = {key: device.alive()[key] - count for key, count in alive.items()}
    alive = {key: device.alive()[key] for key in IN_FLIGHT}
    operator_call = name.startswith("acl") and not name.startswith("aclrt") and "@" not in name
    leaking += operator_call and any(left.values())
    if left["executors"] or (any(left.values()) and not operator_call):
        problems.append(f"{name} {n}: leaks {left}")
    if not torch.equal(step(), want):
        problems.append(f"{name} {n}: the next step is wrong")
print(
    f"sweep: {len(plan)} calls of {len(uses)} kinds failed once each, ignored by torch_npu: "
    f"{sorted(set(silent))}, arguments left by torch_npu: {leaking}"
)
for problem in problems:
    print("PROBLEM", problem)
sys.exit(bool(problems))
