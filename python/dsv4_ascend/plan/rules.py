"""The formula behind every printed number, with its source and the numbers that enter it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Rule:
    """A formula in words, where it is from, and the keys of numbers.py that it takes."""

    formula: str
    source: str
    keys: tuple[str, ...] = ()


_TIME = ("hbm_gbps", "eta_compute", "eta_hbm")
_RATES = ("bf16_tflops", "int8_tops", "fp8_tflops")
_MOVED = ("link_gbps", "far_gbps", "eta_link", "fabric_devices")

RULES: Mapping[str, Rule] = MappingProxyType({
    "asked": Rule("as asked", "the command line"),
    "budget": Rule("visible_gb x utilisation", "planner.md 3.3", ("visible_gb", "utilisation")),
    "weights": Rule(
        "(replicated + sharded / tp + experts / ep), each the parameters of its classes x bits / 8",
        "planner.md 2; parameters counted from the tensors that config.json implies",
    ),
    "draft": Rule(
        "the draft block: its experts / ep + the rest, which nothing divides", "planner.md 2"
    ),
    "comm": Rule("2 x comm_mib, with more than one device", "planner.md 3.3", ("comm_mib",)),
    "workspace": Rule("workspace_gib", "planner.md 3.3", ("workspace_gib",)),
    "free": Rule("budget - weights - draft - buffers - workspace", "planner.md 3.3"),
    "cache": Rule(
        "compressed layers: (context // ratio) rows; windows: sliding_window rows a layer; "
        "states: 2 fp32 vectors a token of an open block; row bytes by the cache format",
        "planner.md 3.1; ascend-operators.md 7",
    ),
    "pages": Rule(
        "whole pages: ceil(context / (block x ratio)) a compressed layer, ceil(rows / page) + 1 "
        "of windows and states, states padded to the page whose pool they share",
        "planner.md 3.2",
    ),
    "waste": Rule("paged bytes / bytes of rows - 1", "planner.md 3.2"),
    "hit": Rule(
        "least common multiple of the tokens in a page over all groups, twice that with drafts",
        "planner.md 3.2; vllm-ascend#10710, #16270",
    ),
    "requests": Rule(
        "dp x min(floor(free / cache of one request), captured_requests)",
        "planner.md 3.3; S16", ("captured_requests",),
    ),
    "head-room": Rule(
        "free - caches of the requests asked for; TIGHT below headroom_gib",
        "planner.md 3.3, 8", ("headroom_gib",),
    ),
    "dense": Rule(
        "2 x rows x parameters at the rate of their bits; weights read once a pass",
        "planner.md 4", (*_TIME, *_RATES),
    ),
    "index": Rule(
        "csa layers x 2 x index heads x index dim x scores / tp; index keys read once a request",
        "planner.md 4", (*_TIME, *_RATES),
    ),
    "core": Rule(
        "4 x head dim x heads / tp x keys attended, bf16; cache rows gathered",
        "planner.md 4", (*_TIME, "bf16_tflops"),
    ),
    "mHC": Rule(
        "mixes in HF32 on the cube (planner.md 6.2 leaves them out); streams cross memory 7 times",
        "planner.md 4; docs/spec/deployments.md", (*_TIME, "bf16_tflops", "hf32_share"),
    ),
    "experts": Rule(
        "6 x hidden x width x chosen x rows / ep; experts touched: 1 - (1 - k / E) ^ rows",
        "planner.md 4", (*_TIME, *_RATES, "touched_share"),
    ),
    "exchange": Rule(
        "own rows x k x hidden x 3 bytes x (ep - 1) / ep over the fabric, what leaves it beside "
        "that over far_gbps, + 2 exchange_us a layer",
        "planner.md 4", (*_MOVED, "exchange_us", "exchange_overlap"),
    ),
    "all-reduce": Rule(
        "layers x 2 (tp - 1) / tp x rows x hidden x 2 bytes, + 2 allreduce_us a layer",
        "planner.md 4", (*_MOVED, "allreduce_us"),
    ),
    "head": Rule(
        "2 x vocabulary x hidden x rows, divided by max(tp, head_tp)",
        "planner.md 4", (*_TIME, "bf16_tflops", "head_tp"),
    ),
    "launch": Rule(
        "layers x kernels x gap_us a pass", "planner.md 4",
        ("kernels", "gap_us", "eager_us"),
    ),
    "draft time": Rule(
        "drafts x (draft_layer x an average layer + the head), one after the other",
        "planner.md 4", ("draft_layer",),
    ),
    "step": Rule(
        "classes added; of a class the longer of compute and HBM, + link + latency + launch",
        "planner.md 4", (*_TIME, *_RATES, *_MOVED),
    ),
    "prefill": Rule(
        "as a step with the prompt's rows in passes of prefill_chunk, index and core summed over "
        "positions, the head for one row; one prompt in each group",
        "planner.md 4", (*_TIME, *_RATES, *_MOVED, "prefill_chunk"),
    ),
    "tpot": Rule(
        "step / (1 + accepted)", "planner.md 4",
        ("accepted_1", "accepted_2", "accepted_3"),
    ),
    "tokens": Rule("requests of a group / tp / time per token", "planner.md 4"),
    "share": Rule("part of the step under the preset", "planner.md 4"),
    "ratio": Rule(
        "rate of the experts' products / rate of the fabric; preset: times eta_compute / eta_link; "
        "hidden up to 2 x expert width",
        "planner.md 4.2", (*_RATES, *_MOVED, "mxfp4_tflops", "eta_compute"),
    ),
    "rows": Rule(
        "rate x bits / 8 / (2 x hbm_gbps)", "planner.md 4", ("hbm_gbps", *_RATES)
    ),
    "limits": Rule(
        "query heads of the attention operator, groups, experts, degrees of the dispatch",
        "planner.md 5 rule 6; ascend-operators.md 4.11, 5.1; formats.toml",
    ),
    "doubt": Rule("the number and what other sources say", "devices.toml"),
    "window": Rule(
        "tokens of a device x k x hidden x 3 bytes x 2 within comm_mib (UNCONFIRMED)",
        "planner.md 3.3", ("comm_mib", "prefill_chunk"),
    ),
    "preset": Rule("what the efficiencies were fitted to", "planner.md 4.1, 7"),
    "what-if": Rule("the step with the change, beside the step", "planner.md 8", ("eager_us",)),
})  # fmt: skip
