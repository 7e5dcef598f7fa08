"""One layer of each kind at the widths of a release, with few experts, on the software device.

Usage: production.py flash|pro|least PROFILE [KIND...]; least: of what chips take. Random weights in
the formats of the profile, a prefill and decode steps, beside the CPU's, and every operator beside
its reference. Prints which references ran, and the launches of a decode step by kind of layer: of
the last one, as what the first of a kind does for all of them is done once.
"""

import collections
import dataclasses
import functools
import sys

import numpy as np
import torch
from seeds import seed

from dsv4_ascend.checkpoint.config import V4Config
from dsv4_ascend.checkpoint.layout import FP32_NAMES
from dsv4_ascend.model.cache import PagedCache
from dsv4_ascend.model.captured import DecodeGraphs
from dsv4_ascend.model.profile import profile_named
from dsv4_ascend.model.step import make_step
from dsv4_ascend.model.transformer import Transformer
from dsv4_ascend.model.weights import prepare_weights
from dsv4_ascend.parity.arrays import to_array
from dsv4_ascend.parity.runner import mutated_arguments
from dsv4_ascend.weights.deployed import (
    Bf16Experts,
    Int8,
    Int8Experts,
    Mx4Experts,
    Mx8,
)
from dsv4_ascend.weights.experts import ExpertStack
from dsv4_ascend.weights.formats import Float, FloatExperts, Fp4Experts
from dsv4_ascend.weights.linear import Linear
from dsv4_ascend.weights.storage import BF16_STORAGE, INT8_STORAGE
from dsv4_backend import dispatch
from dsv4_backend.contract import Operator
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
LEAST_ON_A5 = dict(hidden_size=4096)
IDS = torch.randint(
    VOCABULARY, (PROMPT + DECODED,), generator=torch.Generator().manual_seed(seed("ids"))
)
device = current()


def config_of(release, kinds, profile):
    """The release's configuration with one layer of each kind, few experts and words."""
    ratios = tuple(RATIOS[kind] for kind in kinds)
    least = LEAST | (LEAST_ON_A5 if "950" in torch.npu.get_device_name(0) else {})
    widths = V4Config.flash() if release == "least" else getattr(V4Config, release)()
    return dataclasses.replace(
        dataclasses.replace(widths, **least) if release == "least" else widths,
        vocab_size=VOCABULARY,
        n_routed_experts=EXPERTS,
        num_hash_layers=1,
    ).with_layers(ratios)


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
    if profile.storage in (None, BF16_STORAGE):
        values = torch.randn(e, n, k, generator=generator) / k**0.5
        float_ = FloatExperts if profile.storage is None else Bf16Experts
        return float_(values.to(profile.dtype), None)
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


def random_network(config, profile, number=0):
    """One of many networks on the CPU, its weights random in the profile's formats."""
    generator = torch.Generator().manual_seed(seed("weights") + number)
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
    if network.profile.storage is not None:
        prepare_weights(network, network.profile.storage)
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
            joined=network.profile.latents.joined,
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


class EveryOperator:
    """Runs the reference of every operator on the CPU beside it, with the same arguments.

    worst: by operator, the root mean square of the difference over that of what the reference
    gives, of what an operator says is measured where several results are right.
    """

    def __init__(self):
        self.worst, self._inside, self.listens = collections.defaultdict(float), False, True

    def __enter__(self):
        self._call = Operator.__call__
        Operator.__call__ = lambda operator, *given: self._compared(operator, given)
        return self

    def __exit__(self, *_):
        Operator.__call__ = self._call

    def _compared(self, operator, given):
        if self._inside or not self.listens:
            return self._call(operator, *given)
        self._inside = True
        operator.load_proof()
        before = [_on_host(value) for value in given]
        arguments = [_on_host(value) for value in given]
        result = self._call(operator, *given)
        after = [_on_host(value) for value in given]
        got = _outputs(operator, before, _on_host(result), after)
        want = _outputs(operator, before, operator.reference(*arguments), arguments)
        for one, other in zip(got, want, strict=True):
            difference = np.linalg.norm(one - other) / max(np.linalg.norm(other), 1e-30)
            self.worst[operator.name] = max(self.worst[operator.name], float(difference))
        self._inside = False
        return result


def _on_host(value):
    if isinstance(value, tuple):
        return tuple(map(_on_host, value))
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value


def _outputs(operator, given, result, after):
    """float64 arrays of results and of written arguments, or of their measure."""
    results = result if isinstance(result, tuple) else () if result is None else (result,)
    parts = [to_array(r) for r in results]
    parts += [to_array(after[i]) for i in mutated_arguments(operator)]
    if operator.measure is not None:
        measured = operator.measure(*map(to_array, given), *parts)
        parts = measured if isinstance(measured, tuple) else (measured,)
    # A score of minus infinity says that a choice was none; both sides say it at the same places.
    return [np.nan_to_num(np.asarray(part, np.float64), neginf=0.0, posinf=0.0) for part in parts]


def beside(got, want):
    """Root mean square of the difference over that of `want`, of the worst row."""
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1)).max())


def launched():
    torch.npu.synchronize()
    return collections.Counter(device.launches())


def of_step(symbol):
    """Whether a function is called once for all layers of a kind, in the first of them."""
    return symbol.endswith("Metadata")


def count_blocks(network):
    """Launches of each block in the last step, filled as it runs, without those `of_step`."""
    counts = [collections.Counter() for _ in network.layers]
    for number, block in enumerate(network.layers):
        block.run = functools.partial(_counted, block.run, counts, number)
    return counts


def _counted(run, counts, number, *arguments):
    before = launched()
    streams = run(*arguments)
    made = launched() - before
    counts[number] = collections.Counter({s: n for s, n in made.items() if not of_step(s)})
    return streams


def main(release, name, *kinds):
    profile = profile_named(name)
    kinds = kinds or tuple(RATIOS)
    network = random_network(config_of(release, kinds, profile), profile)
    with torch.inference_mode():
        other_bits = Run(network, "cpu").logits()
        with dispatch.use("reference"):
            want = Run(network, "cpu").logits()
        dispatch.forget_ran()
        network = to_device(network)
        again = Run(network, "npu").captured()
        eager, blocks = Run(network, "npu"), count_blocks(network)
        got, blocks = eager.logits(), list(blocks)
        again_beside = Run(network, "npu")
        with EveryOperator() as operators:
            for ids in (IDS[:PROMPT], IDS[PROMPT : PROMPT + 1]):
                # References take minutes for a prefill at a release's widths.
                operators.listens = release == "least" or len(ids) == 1
                again_beside.eager(ids)
    for (op, where), times in sorted(dispatch.ran().items()):
        if where == "npu" and "reference" in times:
            print(f"ran a reference: {op} {times}")
    print(f"beside the CPU: {beside(got, want):.4f}")
    print(f"the CPU's kernels beside its references: {beside(other_bits, want):.4f}")
    name, difference = max(operators.worst.items(), key=lambda item: item[1])
    print(f"worst operator beside its reference: {difference:.2e} {name}")
    print(f"captured equals eager: {torch.equal(got, again)}")
    once = eager.launches[-1].total()
    for kind in dict.fromkeys(kinds):
        last = [counts for of, counts in zip(kinds, blocks, strict=True) if of == kind][-1]
        print(f"launches of a decode step, {kind}: {last.total()}")
        print("  ", ", ".join(f"{times} {symbol[5:]}" for symbol, times in last.most_common()))
        once -= kinds.count(kind) * last.total()
    print(f"launches of a decode step, once: {once}")


if __name__ == "__main__":
    main(*sys.argv[1:])
