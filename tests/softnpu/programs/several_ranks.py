"""The shipped small model on two NPUs: in every layout the logits and texts of one CPU."""

import torch
import torch_npu  # noqa: F401

from dsv4_ascend.model.model import load
from dsv4_ascend.model.ranks import connected, local_device
from dsv4_ascend.tiny.release import SHIPPED

IDS = [[0, 17, 300, 41, 5, 99, 7], [0, 8]]
NEW = 3
device = local_device("npu")
one = load(SHIPPED, profile="ideal")
logits = one.forward(IDS, chunk=4, decode_from=6)
texts = one.generate(IDS, max_new_tokens=NEW, draft_tokens=1, stop_ids=())
layouts = ({"tp": 2}, {"dp": 2})
assert torch.device(device).index is not None

for layout in layouts:
    with connected(device, **layout) as parallel:
        model = load(SHIPPED, profile="ideal", device=device, parallel=parallel)
        found = model.forward(IDS, chunk=4, decode_from=6)
        assert found.device == torch.device(device)
        assert (found.cpu() - logits).abs().max() <= 1e-4, layout
        found = model.generate(IDS, max_new_tokens=NEW, draft_tokens=1, stop_ids=())
        assert found == texts, (layout, found, texts)
print("good")
