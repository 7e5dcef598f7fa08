"""A model wide enough for MC2 on two NPUs with tokens of their own: the bits that all-to-all gives,
the texts of one CPU, and one dispatch and one combine for each layer. `mc2_ranks.py PROFILE`.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path

import torch
import torch_npu  # noqa: F401

sys.path.append(str(Path(__file__).parents[2] / "python" / "model"))
from quantised_networks import QUANTISED, write_quantised

from dsv4_ascend.model.model import load
from dsv4_ascend.model.ranks import connected, local_device
from softnpu import current

CONFIG = dataclasses.replace(QUANTISED, hidden_size=1024)
PROMPTS = [[0, 17, 30, 41, 5, 96, 7], [0, 8]], [[3, 9, 27]]  # of the last, one rank has nothing
profile, device = sys.argv[1], local_device("npu")


def outcome(model):
    """Logits and texts: chunks, drafts, uneven tokens, a rank without any."""
    logits = model.forward(PROMPTS[0], chunk=4, decode_from=5).cpu()
    texts = [model.generate(p, max_new_tokens=3, draft_tokens=1, stop_ids=()) for p in PROMPTS]
    return logits, texts


def launched(part):
    return sum(n for name, n in current().launches().items() if part in name)


with tempfile.TemporaryDirectory() as folder:
    write_quantised(Path(folder), CONFIG)
    one = outcome(load(folder, profile=profile))
    with connected(device, dp=2) as parallel:
        fused = outcome(load(folder, profile=profile, device=device, parallel=parallel))
        pairs = launched("MoeDistributeDispatchV4"), launched("MoeDistributeCombineV4")
        assert pairs[0] == pairs[1] > 0 and launched("Alltoall") == launched("AlltoAll") == 0, pairs
        plain = dataclasses.replace(parallel, mc2=None)
        moved = outcome(load(folder, profile=profile, device=device, parallel=plain))
        assert launched("MoeDistributeDispatchV4") == pairs[0] and launched("AlltoAll") > 0
        assert torch.equal(fused[0], moved[0]) and fused[1] == moved[1] == one[1], (fused, moved)
        print(f"{pairs[0]} layers, logits {(fused[0] - one[0]).abs().max():.2g} from one CPU, good")
