"""Profiles bf16, a2a3-int8 and a5-mx: what each weight becomes,
and each rounding point against a formula written here.

Sources: spec/deployments.md 2 to 5, 7, 8. Roundings inside one operator are tested with it, the
indexer in test_deployment_indexer.py.
"""

from __future__ import annotations

import numpy as np
import torch
from deployments import both, on_chips
from quantised_networks import QUANTISED
from seeds import generator
from tiny_networks import CONFIG, random_model
from torch.nn.functional import linear, silu

from dsv4_ascend.model.model import Model
from dsv4_ascend.model.profile import PROFILES
from dsv4_ascend.model.rotary import Rotation
from dsv4_ascend.model.rows import Qkv
from dsv4_ascend.model.transformer import Transformer
from dsv4_ascend.model.weights import assign_all, official_tensors
from dsv4_ascend.weights.activations import UNQUANTISED
from dsv4_ascend.weights.deployed import (
    Bf16Experts,
    Int8,
    Int8Experts,
    Mx4Experts,
    Mx8,
    Mx8Experts,
    TiledMx4Experts,
    prepared,
)
from dsv4_ascend.weights.experts import ExpertStack
from dsv4_ascend.weights.formats import Chosen, Float, Shared, widened
from dsv4_ascend.weights.linear import Linear
from dsv4_backend import dispatch
from dsv4_backend.ops.mx import quantize_weight_mxfp8
from dsv4_backend.ops.mx_tiles import pack_mxfp4
from dsv4_backend.ops.norm import head_rms_norm
from dsv4_backend.ops.quant import act_qdq, quantize_weight_fp4
from dsv4_backend.proofs.numerics import BF16


def linears(model: Model) -> dict[str, Linear]:
    return {n: m for n, m in model.network.named_modules() if isinstance(m, Linear)}


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def rows_of(tokens: int, channels: int) -> torch.Tensor:
    return torch.randn(tokens, channels, generator=generator(3)).bfloat16()


# What weights become.

LEFT_IN_BF16 = ("wq_a", "wkv", "wgate", "weights_proj", "embed", "head")
QUANTISED_LINEARS = ("wq_b", "wo_b", "w1", "w2", "w3", "e_proj", "h_proj")


@both
def test_every_linear_has_the_format_of_its_site(models: dict[str, Model], name: str) -> None:
    codes = {"a2a3-int8": Int8, "a5-mx": Mx8}[name]
    wo_a = {"a2a3-int8": Float, "a5-mx": Mx8}[name]
    wanted = (
        dict.fromkeys(LEFT_IN_BF16, Float)
        | dict.fromkeys(QUANTISED_LINEARS, codes)
        | {"wo_a": wo_a}
    )
    found = {path: type(module.stored()) for path, module in linears(models[name]).items()}
    assert {path.rpartition(".")[2] for path in found} == set(wanted)
    assert found == {path: wanted[path.rpartition(".")[2]] for path in found}
    stacks = [m for m in models[name].network.modules() if isinstance(m, ExpertStack)]
    assert {type(s.stored()) for s in stacks} == {
        {"a2a3-int8": Int8Experts, "a5-mx": Mx4Experts}[name]
    }


@both
def test_weights_lose_what_their_format_says_and_no_more(
    models: dict[str, Model], name: str
) -> None:
    """FP8 in bf16 and FP8 and FP4 as MX are exact; int8 is half a step away at most."""
    official = linears(models["official"])
    for path, module in linears(models[name]).items():
        want, kept = official[path].stored().values(torch.float32), module.stored()
        error = (kept.values(torch.float32) - want).abs()
        allowed = kept.scale.unsqueeze(1) / 2 if isinstance(kept, Int8) else torch.zeros(1, 1)
        assert (error <= allowed * (1 + 1e-6)).all(), path
        if isinstance(kept, Int8):
            assert (kept.weight.abs().amax(1) >= 126).all(), path


def test_bf16_holds_every_official_value(models: dict[str, Model]) -> None:
    """Codes of 4 or 8 bits times powers of two fit into bf16."""
    official = linears(models["official"])
    for path, module in linears(models["bf16"]).items():
        kept = module.stored()
        assert (type(kept), kept.weight.dtype) == (Float, torch.bfloat16), path
        assert torch.equal(kept.weight.float(), official[path].stored().values(torch.float32)), path
    stored = models["official"].network.layers[0].ffn.experts.stacks()
    for projection, stack in models["bf16"].network.layers[0].ffn.experts.stacks().items():
        assert isinstance(stack.stored(), Bf16Experts)
        for e, matrix in enumerate(stack.weight):
            want = widened(stored[projection].weight[e], stored[projection].scale[e])
            assert torch.equal(matrix.float(), want), (projection, e)


def test_official_experts_are_mx_as_they_are(models: dict[str, Model]) -> None:
    stored = models["official"].network.layers[0].ffn.experts.stacks()
    for projection, stack in models["a5-mx"].network.layers[0].ffn.experts.stacks().items():
        assert torch.equal(stack.weight, stored[projection].weight)
        assert torch.equal(
            stack.scale.view(torch.uint8), stored[projection].scale.view(torch.uint8)
        )


@on_chips
def test_streams_are_mixed_in_hf32(models: dict[str, Model], name: str) -> None:
    dispatch.forget_ran()
    models[name].generate([[1, 2, 3]], max_new_tokens=1)
    ran = {operator for operator, _ in dispatch.ran()}
    assert ran >= {"hc_pre_hf32", "hc_head_hf32"}
    assert not ran & {"hc_pre", "hc_head"}


def as_deployed(model: Model, name: str) -> Model:
    tensors = list(official_tensors(model.network))
    device = torch.device("cpu")
    return Model(
        assign_all(Transformer(model.config, PROFILES[name]), tensors, device), device=device
    )


@both
def test_float_weights_of_odd_sizes_are_deployed_too(name: str) -> None:
    """Heads of 24 + 8 channels, index keys of 32, experts of 48: no width of a released model."""
    model = random_model(CONFIG)
    deployed = as_deployed(model, name)
    ids = torch.randint(CONFIG.vocab_size, (40,), generator=generator(9)).tolist()
    want, got = model.forward(ids), deployed.forward(ids)
    assert relative(got, want) < 0.5
    assert torch.isfinite(got).all()
    assert torch.equal(deployed.forward(ids, block_size=3), got)
    stacks = deployed.network.layers[0].ffn.experts.stacks()
    if name == "a5-mx":
        assert [type(stacks[p].stored()) for p in ("w1", "w2")] == [Mx4Experts, Mx8Experts]


# Products.

SAME, OTHER = 0.004, 0.006
"""A bf16 result carries 2^-9 of rounding noise; int8 inputs about 1 %, MX-FP8 inputs 2.5 %."""


def int8_by_hand(x: torch.Tensor, weight: Int8) -> np.ndarray:
    """Row by row: integers, then both scales in fp32, then bf16."""
    result = []
    for row in x.float().numpy():
        scale = np.float32(np.abs(row).max() / np.float32(127))
        codes = np.rint(row / scale).astype(np.int64)
        sums = (weight.weight.numpy().astype(np.int64) @ codes).astype(np.float32)
        result.append((sums * weight.scale.numpy() * scale).astype(BF16))
    return np.stack(result).astype(np.float32)


def test_int8_linears_are_integers_times_scales(models: dict[str, Model]) -> None:
    for path, module in linears(models["a2a3-int8"]).items():
        weight = module.stored()
        if isinstance(weight, Int8):
            x = rows_of(5, weight.weight.shape[1])
            assert np.array_equal(module(x).float().numpy(), int8_by_hand(x, weight)), path
            assert relative(module(x), linear(x.float(), weight.values(torch.float32))) > OTHER, (
                path
            )


def test_mx_linears_quantise_blocks_of_32(models: dict[str, Model]) -> None:
    for path, module in linears(models["a5-mx"]).items():
        kept = module.stored()
        if isinstance(kept, Mx8):
            channels = kept.weight.shape[1]
            x = rows_of(5, channels)
            # Next to it, a block of 128 channels loses the others; its weight is 0.
            x[:, ::128] = 2**14
            codes = kept.weight.clone()
            codes.view(torch.uint8)[:, ::128] = 0
            weight = Mx8(codes, kept.scale)
            got, by_hand = weight.matmul(x, module.activations), weight.values(torch.float32)
            assert relative(got, linear(act_qdq(x, 32, channels).float(), by_hand)) < SAME, path
            assert relative(got, linear(act_qdq(x, 128, channels).float(), by_hand)) > OTHER, path
            assert relative(got, linear(x.float(), by_hand)) > OTHER, path
            assert (
                relative(
                    module(rows_of(5, channels)), linear(rows_of(5, channels).float(), by_hand)
                )
                > OTHER
            ), path


@both
def test_wq_a_and_wkv_take_bf16(models: dict[str, Model], name: str) -> None:
    for path, module in linears(models[name]).items():
        if path.endswith(("wq_a", "wkv")):
            x = rows_of(5, module.weight.shape[1])
            assert relative(module(x), linear(x.float(), module.weight.float())) < SAME, path


@both
def test_heads_are_quantised_before_wo_a_on_a5_only(models: dict[str, Model], name: str) -> None:
    attn = models[name].network.layers[0].attn
    o = rows_of(7, attn.heads * attn.head_dim).view(7, attn.heads, attn.head_dim)
    weight = attn.wo_a.stored().values(torch.float32).unflatten(0, (attn.groups, -1))
    got = attn.wo_a.stored().project(o, attn.groups)

    def projected(heads: torch.Tensor) -> torch.Tensor:
        grouped = heads.float().flatten(1).unflatten(1, (attn.groups, -1))
        return torch.einsum("tgk,grk->tgr", grouped, weight).flatten(1)

    plain, quantised = (
        projected(o),
        projected(act_qdq(o.flatten(1), 32, o[0].numel()).view(o.shape)),
    )
    near, far = (plain, quantised) if name == "a2a3-int8" else (quantised, plain)
    assert relative(got, near) < SAME
    assert relative(got, far) > OTHER


def quantised_rows(x: torch.Tensor, name: str) -> torch.Tensor:
    if name == "a5-mx":
        return act_qdq(x, 32, x.shape[1])
    scale = x.abs().amax(1, keepdim=True) / 127
    return (x / scale).round() * scale


def experts_by_hand(
    stacks, rows: torch.Tensor, ends: list[int], name: str, without: str = ""
) -> torch.Tensor:
    """w2 of the clamped SwiGLU of every row, with one rounding point left out;
    quantised straight from fp32.
    """
    results = []
    limit = QUANTISED.swiglu_limit
    for e in range(len(ends) - 1):
        x = rows[ends[e] : ends[e + 1]].float()
        x = x if without == "input" else quantised_rows(x, name)
        gate, up = (linear(x, values(stacks[p], e)) for p in ("w1", "w3"))
        if name == "a5-mx":
            gate, up = gate.bfloat16().float(), up.bfloat16().float()
        h = silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
        h = h if without == "hidden" else quantised_rows(h, name)
        results.append(linear(h, values(stacks["w2"], e)).bfloat16())
    return torch.cat(results)


def values(stack: ExpertStack, e: int) -> torch.Tensor:
    weights = stack.stored()
    if isinstance(weights, Int8Experts):
        return weights.weight[e].float() * weights.scale[e].unsqueeze(1)
    nibbles = torch.stack(
        [weights.weight[e].view(torch.uint8) & 15, weights.weight[e].view(torch.uint8) >> 4], -1
    )
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = nibbles.flatten(1).long()
    signed = magnitudes[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
    return signed * weights.scale[e].float().repeat_interleave(32, 1)


@both
def test_experts_round_where_the_chips_do(models: dict[str, Model], name: str) -> None:
    experts = models[name].network.layers[1].ffn.experts
    ends = [0, *torch.tensor([5, 0, 9, 1, 17, 3, 2, 11]).cumsum(0).tolist()]
    offsets = torch.tensor(ends, dtype=torch.int32)
    rows = rows_of(ends[-1], QUANTISED.hidden_size)
    plain = experts(rows, torch.ones(ends[-1]), offsets, QUANTISED.swiglu_limit)
    assert relative(plain, experts_by_hand(experts.stacks(), rows, ends, name)) < SAME
    for point in ("input", "hidden"):
        assert (
            relative(plain, experts_by_hand(experts.stacks(), rows, ends, name, point)) > OTHER
        ), point
    # the routing weight multiplies the bf16 result of w2, in fp32
    weights = torch.rand(ends[-1], generator=generator(4)) * 1.5
    assert torch.equal(plain, plain.bfloat16().float())
    weighted = experts(rows, weights, offsets, QUANTISED.swiglu_limit)
    assert weighted.dtype == torch.float32
    assert torch.equal(weighted, plain * weights.unsqueeze(1))


@both
def test_the_shared_expert_is_one_of_many(models: dict[str, Model], name: str) -> None:
    """Same formula: a stack of one expert made of its matrices gives the same bits."""
    shared = models[name].network.layers[1].ffn.shared_experts
    kind = {"a2a3-int8": Int8Experts, "a5-mx": Mx8Experts}[name]
    stacks = [
        kind(w.weight.unsqueeze(0), w.scale.unsqueeze(0)) for w in (shared.w1, shared.w3, shared.w2)
    ]
    x, limit = rows_of(9, QUANTISED.hidden_size), QUANTISED.swiglu_limit
    offsets = torch.tensor([0, 9], dtype=torch.int32)
    want = stacks[0].mlp(
        stacks[1], stacks[2], x, torch.ones(9), offsets, limit, shared.w1.activations
    )
    assert torch.equal(shared(x, limit).float(), want)


@both
def test_the_norm_of_queries_rounds_once(name: str) -> None:
    q = rows_of(40 * 8, 128).view(40, 8, 128)
    wide = q.double().numpy()
    want = (
        (wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)).astype(np.float32).astype(BF16)
    )
    still = Rotation(torch.ones(40, 2), torch.zeros(40, 2), torch.zeros(40, 2))
    rows = Qkv(q, q[:, 0], None, torch.ones(128), None, 1e-6, still, None)
    got = PROFILES[name].latents.norm_rope(rows)[0].float().numpy()
    assert (got == want.astype(np.float32)).mean() > 0.999
    assert (head_rms_norm(q, 1e-6).float().numpy() == want.astype(np.float32)).mean() < 0.9


def test_experts_of_which_only_some_have_tiles_give_what_rows_give() -> None:
    e, m, d = 3, 96, 64  # w2 has 48 bytes a row, and tiles take multiples of 32
    shapes = (e, m, d), (e, m, d), (e, d, m)
    drawn = [rows_of(n * k, width).view(n, k, width).float() for n, k, width in shapes]
    rows = [Mx4Experts(*quantize_weight_fp4(values)) for values in drawn]
    shared = Shared(*(Mx8(*quantize_weight_mxfp8(values[0])) for values in drawn))
    tiled = [TiledMx4Experts(pack_mxfp4(w.weight), w.scale) for w in rows[:2]]
    chosen = Chosen(torch.full((5, 2), 0.5), torch.tensor([[0, 2]] * 5, dtype=torch.int32))
    rest = shared, rows_of(5, d), chosen, 10.0, UNQUANTISED
    first, second, down = prepared(*tiled, rows[2])
    assert torch.equal(first.layer(second, down, *rest), rows[0].layer(*rows[1:], *rest))
