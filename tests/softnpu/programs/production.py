"""One layer of each kind at the widths of a release, with few experts, on the software device.

Usage: production.py flash|pro|least PROFILE [KIND...]; least: of what chips take. Random weights in
the formats of the profile, a prefill and decode steps, beside the CPU's. Prints which references
ran, and the launches of a decode step by kind of layer.
"""

import collections
import dataclasses
import functools
import sys

import torch
from seeds import seed

from dsv4_ascend.checkpoint.config import V4Config, kinds_of_ratios
from dsv4_ascend.checkpoint.layout import FP32_NAMES
from dsv4_ascend.model.cache import PagedCache
from dsv4_ascend.model.captured import DecodeGraphs
from dsv4_ascend.model.profile import profile_named
from dsv4_ascend.model.step import make_step
from dsv4_ascend.model.transformer import Transformer
from dsv4_ascend.model.weights import prepare_experts
from dsv4_ascend.weights.deployed import INT8_STORAGE, Int8, Int8Experts, Mx4Experts, Mx8
from dsv4_ascend.weights.experts import ExpertStack
from dsv4_ascend.weights.formats import Float, FloatExperts, Fp4Experts
from dsv4_ascend.weights.linear import Linear
from dsv4_backend import dispatch
from softnpu import current

RATIOS = {"swa": 0, "hca": 128, "csa": 4}
EXPERTS, VOCABULARY, PROMPT, DECODED = 8, 512, 130, 4
LEAST = dict(
    hidden_size=1024,
    num_attention_heads=4,
    q_lora_rank=256,
    o_groups=2,
    o_lora_rank=128,
    moe_intermediate_size=256,
)
IDS = torch.randint(
    VOCABULARY, (PROMPT + DECODED,), generator=torch.Generator().manual_seed(seed("ids"))
)
device = current()


def config_of(release, kinds):
    """The release's configuration with one layer of each kind, few experts and words."""
    ratios = tuple(RATIOS[kind] for kind in kinds)
    widths = V4Config.flash() if release == "least" else getattr(V4Config, release)()
    return dataclasses.replace(
        dataclasses.replace(widths, **LEAST) if release == "least" else widths,
        vocab_size=VOCABULARY,
        n_routed_experts=EXPERTS,
        num_hidden_layers=len(kinds),
        num_hash_layers=1,
        num_nextn_predict_layers=0,
        compress_ratios=ratios,
        layer_kinds=kinds_of_ratios(ratios),
    )


def codes(generator, *shape):
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)


def e8m0(generator, *shape, exponent):
    low, high = exponent + 127, exponent + 129
    drawn = torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)
    return drawn.view(torch.float8_e8m0fnu)


def channels(generator, *shape, k):
    """Scales that bf16 holds, for outputs of about one."""
    return ((0.5 + torch.rand(shape, generator=generator)) / (73 * k**0.5)).bfloat16().float()


def linear_of(generator, profile, path, n, k):
    kept = path.rpartition(".")[2] in (profile.storage.linears if profile.storage else ())
    if not kept:
        values = torch.randn(n, k, generator=generator) / k**0.5
        return Float(values.to(profile.dtype), None)
    if profile.storage is INT8_STORAGE:
        return Int8(codes(generator, n, k), channels(generator, n, k=k))
    halves = torch.randint(-120, 121, (n, k), dtype=torch.int8, generator=generator)
    values = (halves.float() / 64).to(torch.float8_e4m3fn)
    return Mx8(values, e8m0(generator, n, -(-k // 32), exponent=-5))


def experts_of(generator, profile, e, n, k):
    if profile.storage is None:
        values = torch.randn(e, n, k, generator=generator) / k**0.5
        return FloatExperts(values.to(profile.dtype), None)
    if profile.storage is INT8_STORAGE:
        return Int8Experts(codes(generator, e, n, k), channels(generator, e, n, k=k))
    packed = torch.randint(-128, 128, (e, n, k // 2), dtype=torch.int8, generator=generator)
    return Mx4Experts(packed, e8m0(generator, e, n, k // 32, exponent=-7))


def leaf_of(generator, name, shape):
    if name.endswith("norm.weight"):
        return 1 + 0.1 * torch.randn(shape, generator=generator)
    if name.endswith("tid2eid"):
        return torch.stack(
            [torch.randperm(EXPERTS, generator=generator)[: shape[1]] for _ in range(shape[0])]
        )
    value = torch.randn(shape, generator=generator) * (0.5 / shape[-1] ** 0.5)
    return value if name.endswith(FP32_NAMES) else value.bfloat16()


def random_network(config, profile):
    """The network on the CPU, its weights random in the profile's formats."""
    generator = torch.Generator().manual_seed(seed("weights"))
    network = Transformer(config, profile)
    kept = set()
    for path, module in network.named_modules():
        if isinstance(module, ExpertStack):
            module.keep(experts_of(generator, profile, *module.weight.shape))
        elif isinstance(module, Linear):
            module.keep(linear_of(generator, profile, path, *module.weight.shape))
        else:
            continue
        kept |= {f"{path}.weight", f"{path}.scale"}
    for name, parameter in list(network.named_parameters()):
        if name not in kept:
            path, _, leaf = name.rpartition(".")
            value = leaf_of(generator, name, parameter.shape)
            if value.is_floating_point() and not name.endswith(FP32_NAMES):
                value = value.to(profile.dtype)
            setattr(
                network.get_submodule(path), leaf, torch.nn.Parameter(value, requires_grad=False)
            )
    return network.eval()


def to_device(network):
    """The same weights on the device, in its own layout where it has one."""
    for path, module in network.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            moved = parameter.detach().to("npu")
            setattr(module, name, torch.nn.Parameter(moved, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer is not None:
                setattr(module, name, buffer.to("npu"))
        if isinstance(module, ExpertStack) and isinstance(module.stored(), Mx4Experts):
            module.keep(network.profile.storage.experts(Fp4Experts(module.weight, module.scale)))
    prepare_experts(network)
    return network


class Run:
    """A prefill and decode steps over a cache of their own: logits, and the launches of each."""

    def __init__(self, network, where):
        self.network, config = network, network.config
        self.cache = PagedCache(
            config,
            max_sequences=1,
            max_tokens=len(IDS),
            max_step_tokens=PROMPT,
            dtype=network.profile.dtype,
            device=where,
            formats=network.profile.caches,
        )
        self.sequence, self.launches = self.cache.new_sequence(), []

    def counted(self, logits_of, ids):
        before = launched()
        logits = logits_of(ids).cpu()
        self.launches.append(launched() - before)
        return logits

    def eager(self, ids):
        streams = self.network.run_layers(*make_step(self.cache, [self.sequence], [ids]))
        return self.network.logits(streams[-1:])

    def logits(self, decode=None):
        """[1 + DECODED, V]; `decode` makes the logits of a decode step."""
        decode = decode or self.eager
        parts = [self.counted(self.eager, IDS[:PROMPT])]
        parts += [self.counted(decode, ids) for ids in IDS[PROMPT:].split(1)]
        return torch.cat(parts)

    def captured(self):
        """The same with decode steps in a graph."""
        graphs = DecodeGraphs(self.network, self.cache)
        return self.logits(lambda ids: graphs.logits([self.sequence], [ids]))


def beside(got, want):
    """Root mean square of the difference over that of `want`, of the worst row."""
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1)).max())


def launched():
    torch.npu.synchronize()
    return collections.Counter(device.launches())


def count_blocks(network):
    """kind -> launches of its block in the last step, filled as it runs."""
    counts = {}
    for kind, block in zip(network.config.layer_kinds, network.layers, strict=True):
        block.run = functools.partial(_counted, block.run, counts, kind)
    return counts


def _counted(run, counts, kind, *arguments):
    before = launched()
    streams = run(*arguments)
    counts[kind] = launched() - before
    return streams


def main(release, name, *kinds):
    profile = profile_named(name)
    network = random_network(config_of(release, kinds or RATIOS), profile)
    with torch.inference_mode():
        want = Run(network, "cpu").logits()
        dispatch.forget_ran()
        network = to_device(network)
        again = Run(network, "npu").captured()
        eager, blocks = Run(network, "npu"), count_blocks(network)
        got = eager.logits()
    for (op, where), times in sorted(dispatch.ran().items()):
        if where == "npu" and "reference" in times:
            print(f"reference: {op} {times}")
    print(f"beside the CPU: {beside(got, want):.4f}")
    print(f"captured equals eager: {torch.equal(got, again)}")
    for kind, counts in blocks.items():
        print(f"launches of a decode step, {kind}: {counts.total()}")
        print("  ", ", ".join(f"{times} {symbol[5:]}" for symbol, times in counts.most_common()))
    once = eager.launches[-1].total() - sum(counts.total() for counts in blocks.values())
    print(f"launches of a decode step, once: {once}")


main(*sys.argv[1:])
