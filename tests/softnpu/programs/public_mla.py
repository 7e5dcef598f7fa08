"""What multi-head latent attention computes before attention, against its document's formula: bf16
and int8 weights, plain and int8 caches.
"""

import torch
import torch_npu
from fused_check import A5, bf16, f32, problems, refused, rng

TOKENS, WIDTH, LOW, HEADS, NOPE, RANK, TURN = 5, 64, 32, 2, 128, 512, 64
PLACES = [3, 17, 0, 31, 3]


def int8(*shape):
    return torch.tensor(rng.integers(-60, 60, shape), dtype=torch.int8)


def rounded(x):
    return x.bfloat16().float()


def normed(x, gamma, scale):
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-5) * gamma.float() * scale


def turned(x, sin, cos):
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.cat([even, odd], -1) * cos + torch.cat([-odd, even], -1) * sin


def by_rows(x):
    scale = x.abs().amax(-1, keepdim=True) / 127
    return torch.round(x / scale), scale


def expected(x, dq, uq, uk, dkv, gammas, sin, cos, scales=None, factors=(1.0, 1.0)):
    """[query, its scale or None, query's turned part, latent rows, turned keys]"""

    def product(a, w, a_scale, w_scale):
        out = a.double() @ w.double()
        return (out.float() * a_scale * w_scale) if scales else out.float()

    sx, sdq, suq, sdkv, ckv = scales or (None,) * 5
    low = product(x, dq, sx, sdq)
    norm = normed(low if scales else rounded(low), gammas[0], factors[0])
    norm, norm_scale = by_rows(norm) if scales else (rounded(norm), None)
    up = product(norm, uq, norm_scale, suq)
    up = (up if scales else rounded(up)).view(len(x), HEADS, NOPE + TURN)
    query = rounded(torch.einsum("thd,hdr->thr", rounded(up[..., :NOPE]), uk.float()))
    rope = rounded(turned(up[..., NOPE:], sin.float()[:, None], cos.float()[:, None]))
    latent = product(x, dkv, sx, sdkv)
    kv, kr = normed(latent[:, :RANK], gammas[1], factors[1]), latent[:, RANK:]
    kr, scale = turned(kr, sin.float(), cos.float()), None
    if scales:
        query, scale = by_rows(query)
        rope = rope * ckv / scale
        kv = torch.round(kv * ckv).clamp(-128, 127)
    return query, scale, rope, kv, kr


def close(what, found, wanted, tolerance):
    found, wanted = found.cpu().float().reshape(wanted.shape), wanted.float()
    far = (found - wanted).abs() / (1 + wanted.abs())
    if not far.max() <= tolerance:
        problems.append(f"MLA prolog: {what} differs by {far.max():.3g}")
    if (wanted * 1.1 - wanted).abs().max() <= tolerance:
        problems.append(f"MLA prolog: {what} does not tell a factor of 1.1")


def caches(dtype, places, kv, kr):
    latent, keys = torch.zeros(2, 16, 1, RANK, dtype=dtype), bf16(2, 16, 1, TURN)
    wanted = latent.clone().float().view(-1, RANK), keys.clone().float().view(-1, TURN)
    for place, row, key in zip(places, kv, kr, strict=True):
        wanted[0][place], wanted[1][place] = row, key
    return latent, keys, wanted


def check_prolog():
    shapes = ((WIDTH, LOW), (LOW, HEADS * (NOPE + TURN)), (WIDTH, RANK + TURN))
    uk, gammas = bf16(HEADS, NOPE, RANK), (bf16(LOW), bf16(RANK))
    sin, cos = bf16(TOKENS, TURN), bf16(TOKENS, TURN)
    index = torch.tensor(PLACES)
    x, weights = bf16(TOKENS, WIDTH), [bf16(*shape) for shape in shapes]
    query, _, rope, kv, kr = expected(x, weights[0], weights[1], uk, weights[2], gammas, sin, cos)
    latent, keys, wanted = caches(torch.bfloat16, PLACES, kv, kr)
    dq, uq, dkv = (torch_npu.npu_format_cast(w.npu(), 29) for w in weights)
    rest = [t.npu() for t in (*gammas, sin, cos)]
    found = torch_npu.npu_mla_prolog(
        x.npu(), dq, uq, uk.npu(), dkv, *rest, index.npu(), latent.npu(), keys.npu(),
        rmsnorm_epsilon_cq=1e-5, rmsnorm_epsilon_ckv=1e-5, cache_mode="PA_BSND",
    )  # fmt: skip
    for what, got, want in zip(
        ("query", "turned query", "latent cache", "key cache"),
        found, (query, rope, *wanted), strict=True,
    ):  # fmt: skip
        close(what, got, want, 2e-2)

    x, weights = int8(TOKENS, WIDTH), [int8(*shape) for shape in shapes]
    scales = (f32(TOKENS, 1).abs(), *(f32(1, shape[1]).abs() for shape in shapes), f32(1).abs())
    query, scale, rope, kv, kr = expected(
        x, weights[0], weights[1], uk, weights[2], gammas, sin, cos, scales, (3.0, 5.0)
    )
    latent, keys, wanted = caches(torch.int8, PLACES, kv, kr)
    dq, uq, dkv = (torch_npu.npu_format_cast(w.npu(), 29) for w in weights)
    on = [s.npu() for s in scales]
    latent, keys = latent.npu(), keys.npu()

    def call(mode="PA_BSND"):
        return torch_npu.npu_mla_prolog_v3(
            x.npu(), dq, uq, uk.npu(), dkv, *rest, latent, keys, cache_index=index.npu(),
            rmsnorm_epsilon_cq=1e-5, rmsnorm_epsilon_ckv=1e-5, cache_mode=mode,
            dequant_scale_x=on[0], dequant_scale_w_dq=on[1], dequant_scale_w_uq_qr=on[2],
            dequant_scale_w_dkv_kr=on[3], quant_scale_ckv=on[4], weight_quant_mode=2,
            kv_cache_quant_mode=1, query_quant_mode=1, qc_qr_scale=3.0, kc_scale=5.0,
        )  # fmt: skip

    found = call()
    close("int8 query", found[0].float() * found[2].view(1, TOKENS, HEADS, 1)[0],
          query * scale, 3e-2)  # fmt: skip
    close("scales of queries", found[2], scale, 1e-2)
    close("scaled turned query", found[1], rope, 3e-2)
    step = (latent.cpu().view(-1, RANK).float() - wanted[0]).abs().max()
    if step > 1:  # fp32 sums may lie at either side of a half
        problems.append(f"MLA prolog: int8 cache differs by {step}")
    close("key cache beside it", keys, wanted[1], 2e-2)
    refused("npu_mla_prolog_v3", lambda: call("PA_NZ"), "cacheMode")


torch.npu.set_device(0)
if not A5:
    check_prolog()
