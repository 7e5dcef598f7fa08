"""One decode step again and again, while the device delays other streams each time.

Usage: decode_chaos.py PROFILE SEEDS. Prints how many seeds gave other bits than the device at rest,
operator by operator and replayed from a graph.
"""

import sys

import torch
from production import IDS, PROMPT, RATIOS, Run, config_of, device, random_network, to_device

from dsv4_ascend.model.captured import DecodeGraphs
from dsv4_ascend.model.profile import profile_named


def main(name, seeds):
    profile = profile_named(name)
    network = to_device(random_network(config_of("least", tuple(RATIOS), profile), profile))
    run, ids = Run(network, "npu"), IDS[PROMPT : PROMPT + 1]
    with torch.inference_mode():
        run.eager(IDS[:PROMPT])
        graphs = DecodeGraphs(network, run.cache)
        ways = (run.eager, lambda ids: graphs.logits([run.sequence], [ids]))

        def logits(way):
            result = way(ids).cpu()
            run.cache.rollback(run.sequence, 1)
            return result

        want = logits(run.eager)
        for _ in range(2):  # operator by operator, then captured
            assert torch.equal(logits(ways[1]), want)
        others = 0
        for seed in range(1, int(seeds) + 1):
            device.chaos(seed)
            others += not all(torch.equal(logits(way), want) for way in ways)
        device.chaos(0)
    print(f"other bits with {others} of {seeds} seeds")


main(*sys.argv[1:])
