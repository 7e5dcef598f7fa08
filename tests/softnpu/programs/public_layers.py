"""Rotation, hyper-connections, quantisers, slices and attention that torch_npu's public tests call:
against autograd or torch on the CPU, where torch has them, and against formulas.
"""

import numpy as np
import torch
import torch.nn.functional as F
import torch_npu
from aclnn import call
from dense_check import STEP, empty, launch, refuse
from fused_check import A5, Steps, array, bf16, check, f32, refused, rng, same


def close(got, want, tolerance=1e-4):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(
            a.cpu().float(), b.detach().float(), rtol=tolerance, atol=tolerance
        )


def gradients(function, inputs, gradient):
    """What autograd gives for `function(*inputs)`."""
    leaves = [x.clone().float().requires_grad_() for x in inputs]
    function(*leaves).backward(gradient.float())
    return [leaf.grad for leaf in leaves]


def turned(x, mode):
    if mode == "half":
        a, b = x.chunk(2, -1)
        return torch.cat([-b, a], -1)
    pairs = x.unflatten(-1, (-1, 2))
    return torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2)


def check_rotary_gradient():
    """aclnnRotaryPositionEmbeddingGrad gives what autograd gives, for broadcast angles too."""
    for number, mode in enumerate(("half", "interleave")):
        for shape, angle in (((2, 3, 4, 8), (1, 1, 4, 8)), ((2, 2, 5, 6), (1, 1, 5, 6))):
            x, g, cos, sin = f32(*shape), f32(*shape), f32(*angle), f32(*angle)
            want = gradients(lambda x, c, s, m=mode: x * c + turned(x, m) * s, (x, cos, sin), g)
            got = [empty(*shape), empty(*angle), empty(*angle)]
            launch("aclnnRotaryPositionEmbeddingGrad", dy=g, cos=cos, sin=sin, x=x, mode=number,
                   dx=got[0], dcos=got[1], dsin=got[2])  # fmt: skip
            close(got, want)


def check_apply_rotary():
    """npu_apply_rotary_pos_emb turns query and key in place."""
    for heads, keys, width in ((4, 2, 8), (1, 1, 16), (3, 3, 64)):
        q, k = f32(2, 5, heads, width), f32(2, 5, keys, width)
        cos, sin = f32(2, 5, 1, width), f32(2, 5, 1, width)
        want = [x * cos + turned(x, "half") * sin for x in (q, k)]
        got = torch_npu.npu_apply_rotary_pos_emb(*(x.npu() for x in (q, k, cos, sin)), "BSND")
        close(got, want)


def check_hyper_connection_gradients():
    """The gradients of mhc_post are those of its formula."""
    for lead in ((4,), (1, 3), (2, 2)):
        x, g, out = bf16(*lead, 4, 128), bf16(*lead, 4, 128), bf16(*lead, 128)
        res, post = f32(*lead, 4, 4), f32(*lead, 4)
        want = gradients(
            lambda x, r, o, p: r.transpose(-1, -2) @ x + p.unsqueeze(-1) * o.unsqueeze(-2),
            (x, res, out, post), g,
        )  # fmt: skip
        got = torch_npu.npu_mhc_post_backward(*(t.npu() for t in (g, x, res, out, post)))
        close(got, want, 2e-2)


def pre(x, phi, alpha, bias, gamma):
    """(h_in, h_post, h_res) of mhc_pre; eps is 1e-6."""
    n = x.shape[-2]
    flat = x.flatten(-2)
    r = (flat.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    mix = (flat * gamma.reshape(-1)) @ phi.t() * r
    parts = mix.split([n, n, n * n], -1)
    biases = bias.split([n, n, n * n])
    gates = [p * a + b for p, a, b in zip(parts, alpha, biases, strict=True)]
    h_pre = gates[0].sigmoid() + 1e-6
    h_in = (x * h_pre.unsqueeze(-1)).sum(-2)
    return (
        h_in,
        gates[1].sigmoid() * 2,
        gates[2].unflatten(-1, (n, n)),
        r.squeeze(-1),
        mix / r,
        h_pre,
    )


def check_pre_gradients():
    """The gradients of mhc_pre are those of its formula."""
    for lead in ((3,), (2, 2), (5,)):
        n, width = 4, 64
        x, gamma = bf16(*lead, n, width), f32(n, width)
        phi = f32(n * n + 2 * n, n * width, scale=0.05)
        alpha, bias = f32(3), f32(n * n + 2 * n)
        g = [bf16(*lead, width), f32(*lead, n), f32(*lead, n, n)]
        leaves = [t.clone().float().requires_grad_() for t in (x, phi, alpha, bias, gamma)]
        results = pre(*leaves)
        torch.autograd.backward(results[:3], [t.float() for t in g])
        saved = [t.detach() for t in (results[3], results[4], results[5], results[1])]
        got = torch_npu.npu_mhc_pre_backward(
            *(t.npu() for t in (x, phi, alpha, *g, *saved)), gamma=gamma.npu(), hc_eps=1e-6
        )
        close(got, [leaf.grad for leaf in leaves], 2e-2)


def sliced(x, begin, end, step, want, *masks):
    """aclnnStridedSlice: torch_npu 2.13 gets the sizes of some slices wrong. Masks: begin, end,
    ellipsis, new axis, shrunk axis.
    """
    out = empty(*want.shape)
    call("aclnnStridedSlice", x.npu(), begin, end, step, *(masks or (0,) * 5), out)
    assert torch.equal(out.cpu(), want), (begin, end, step, masks)


def check_slices():
    """Slices are NumPy's; the masks are TensorFlow's."""
    x = torch.arange(120, dtype=torch.float32).view(4, 5, 6)
    for begin, end, step in (
        ([1, 0, 2], [4, 5, 6], [1, 2, 2]),
        ([3, 4, 5], [0, 1, 0], [-1, -2, -1]),
        ([-3, 0, -1], [-1, 99, -7], [1, 1, -2]),
        ([0, 2, 0], [4, 2, 6], [1, 1, 1]),
    ):
        want = torch.tensor(array(x)[tuple(map(slice, begin, end, step))].copy()).float()
        sliced(x, begin, end, step, want)
    sliced(x, [2, 1], [3, 5], [1, 1], x[2, 1:5], 0, 0, 0, 0, 1)
    sliced(x, [2, 3], [3, 4], [1, 1], x[:, 3:], 1, 3, 0, 0, 0)
    sliced(x, [2, 3], [0, 4], [-1, 1], x.flip(0)[:, 3:4], 1, 1, 0, 0, 0)
    sliced(x, [1, 0, 2], [3, 0, 5], [1, 1, 1], x[1:3, :, 2:5], 0, 0, 2, 0, 0)
    sliced(x, [0, 1], [0, 3], [1, 1], x[1:3].unsqueeze(0), 0, 0, 0, 1, 0)
    got = torch_npu.npu_indexing(x.npu(), [1, 0, 2], [4, 5, 6], [1, 2, 2])
    assert torch.equal(got.cpu(), x[1:4, ::2, 2::2])


QUANT = Steps(
    along=lambda s, axis, rank: s.reshape([-1 if i == axis % rank else 1 for i in range(rank)]),
    scaled=lambda x, s: x / s,
    rounded=np.rint,
    shifted=lambda y, z: y + z,
    clipped=lambda y: np.clip(y, -128, 127) * STEP,
)


def quantised(case, steps):
    x, s, z, axis = array(case[0]), array(case[1]), array(case[2]), case[3]
    table = [steps.along(t, axis, x.ndim) for t in (s, z)]
    return [steps.clipped(steps.shifted(steps.rounded(steps.scaled(x, table[0])), table[1]))]


def call_quantised(x, s, z, axis):
    return [torch_npu.npu_quantize(x, s, z, torch.qint8, axis).float() * STEP]


def some_scales(n):
    return torch.tensor(rng.uniform(0.005, 0.05, n), dtype=torch.float32)


def some_points(n):
    return torch.tensor(rng.integers(-9, 10, n), dtype=torch.int32)


check("npu_quantize", call_quantised, quantised, QUANT,
      [(f32(4, 4), some_scales(4), some_points(4), 0),
       (f32(3, 5, 3), some_scales(3), some_points(3), 2),
       (f32(6, 7), some_scales(7), some_points(7), 1)],
      {"the other axis": dict(along=lambda s, axis, rank: QUANT.along(
          np.resize(s, s.size), axis, rank)[::-1] if axis == 0 else QUANT.along(
              s[::-1], axis, rank)),
       "multiplied": dict(scaled=lambda x, s: x * s),
       "cut": dict(rounded=np.trunc),
       "upwards": dict(rounded=np.ceil),
       "no zero point": dict(shifted=lambda y, z: y),
       "subtracted": dict(shifted=lambda y, z: y - z),
       "not clipped": dict(clipped=lambda y: y * STEP),
       "unsigned": dict(clipped=lambda y: np.clip(y, 0, 255) * STEP)}, 1e-5)  # fmt: skip

MLA = Steps(
    rms=lambda x: 1 / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5),
    gamma=lambda y, gamma: y * gamma,
    order=lambda x: np.concatenate([x[..., ::2], x[..., 1::2]], -1),
    turn=lambda x: np.concatenate([-np.split(x, 2, -1)[1], np.split(x, 2, -1)[0]], -1),
    slot=lambda index: index,
    tile=lambda cache, width: cache.reshape(-1, cache.shape[1] // 16, width // 16, 16, 16),
)


def mla_cache(case, steps):
    kv, gamma, cos, sin, index, blocks = (
        array(c) if isinstance(c, torch.Tensor) else c for c in case
    )
    width = len(gamma)
    latent, rope = kv[..., :width], steps.order(kv[..., width:])
    c = steps.gamma(latent * steps.rms(latent), gamma).reshape(-1, width)
    k = (rope * cos + steps.turn(rope) * sin).reshape(-1, cos.shape[-1])
    caches = []
    for rows in (k, c):
        cache = np.ones((blocks * 16, rows.shape[1]))
        for row, slot in zip(rows, steps.slot(index), strict=True):
            if slot >= 0:
                cache[slot] = row
        caches.append(cache.reshape(blocks, 16, 1, -1))
    return caches


def call_mla_cache(kv, gamma, cos, sin, index, blocks):
    caches = [torch.ones(blocks, 16, 1, n, dtype=kv.dtype, device="npu")
              for n in (cos.size(-1), len(gamma))]  # fmt: skip
    torch_npu.npu_kv_rmsnorm_rope_cache(
        kv, gamma, cos, sin, index, *caches, epsilon=1e-5, cache_mode="PA_BNSD"
    )
    return caches


def mla_case(batch, tokens, blocks, width=32, rope=16):
    slots = torch.tensor(rng.permutation(blocks * 16)[: batch * tokens])
    slots[-1] = -1
    return (
        bf16(batch, 1, tokens, width + rope), bf16(width), bf16(batch, 1, tokens, rope),
        bf16(batch, 1, tokens, rope), slots, blocks,
    )  # fmt: skip


check("npu_kv_rmsnorm_rope_cache", call_mla_cache, mla_cache, MLA,
      [mla_case(2, 3, 2), mla_case(1, 9, 1), mla_case(3, 2, 4)],
      {"no norm": dict(rms=np.ones_like),
       "sum of squares": dict(rms=lambda x: 1 / np.sqrt((x**2).sum(-1, keepdims=True))),
       "no gamma": dict(gamma=lambda y, gamma: y),
       "halves not ordered": dict(order=same),
       "turned backwards": dict(turn=lambda x: -MLA.turn(x)),
       "not turned": dict(turn=np.zeros_like),
       "-1 is slot 0": dict(slot=lambda index: np.maximum(index, 0)),
       "slots in order": dict(slot=lambda index: np.arange(len(index)))}, 1e-2)  # fmt: skip


def check_dropout():
    """A given mask drops probabilities, in the gradients too."""
    b, n, s, d, keep = 1, 2, 16, 16, 0.8
    q, k, v, g = (f32(b, n, s, d) for _ in range(4))
    kept = torch.tensor(rng.random((b, n, s, s)) < keep)
    bits = torch.tensor(np.packbits(kept.numpy().reshape(-1), bitorder="little"))

    def attention(q, k, v):
        p = (q @ k.transpose(-1, -2) * 0.25).softmax(-1)
        return (p * kept / keep) @ v

    statistics, out = [empty(b, n, s, 8), empty(b, n, s, 8)], empty(b, n, s, d)
    settings = [None, 0.25, keep, 65536, 65536, n, "BNSD", 0, 0]  # prefix ... sparse mode
    mask = bits.npu()
    on_npu = [x.npu() for x in (q, k, v, g)]
    call("aclnnFlashAttentionScore", *on_npu[:3], None, mask, None, None, *settings, *statistics,
         None, out)  # fmt: skip
    close([out], [attention(q, k, v)])
    got = [empty(b, n, s, d) for _ in range(3)]
    call("aclnnFlashAttentionScoreGrad", *on_npu, None, mask, None, None, *statistics, None, out,
         *settings, *got, None)  # fmt: skip
    close(got, gradients(attention, (q, k, v), g))


def check_ragged():
    """Sequences that lie behind each other: each attends to itself, in the gradients too."""
    for ends, heads in (((5, 12), 2), ((3, 4, 9), 4), ((7,), 1)):
        total, width, scale = ends[-1], 16, 0.25
        q, g = f32(total, 4, width), f32(total, 4, width)
        k, v = f32(total, heads, width), f32(total, heads, width)

        def attention(q, k, v, ends=ends, scale=scale):
            results, begin = [], 0
            for end in ends:
                one = [x[begin:end].transpose(0, 1) for x in (q, k, v)]
                keys = [x.repeat_interleave(len(one[0]) // len(x), 0) for x in one]
                p = (keys[0] @ keys[1].transpose(1, 2) * scale).softmax(-1)
                results.append((p @ keys[2]).transpose(0, 1))
                begin = end
            return torch.cat(results)

        leaves = [x.npu().requires_grad_() for x in (q, k, v)]
        got = torch_npu.npu_fusion_attention(
            *leaves, 4, "TND", scale=scale, actual_seq_qlen=ends, actual_seq_kvlen=ends
        )[0]
        got.backward(g.npu())
        close([got], [attention(q, k, v)])
        close([leaf.grad for leaf in leaves], gradients(attention, (q, k, v), g))


def block_sparse(q, k, v, chosen, rows, columns, scale):
    mask = chosen.repeat_interleave(rows, 2).repeat_interleave(columns, 3)
    logits = (q @ k.transpose(-1, -2) * scale).masked_fill(
        ~mask[..., : q.size(2), : k.size(2)].bool(), float("-inf")
    )
    return logits.softmax(-1).nan_to_num(0) @ v


def check_block_sparse():
    """Attention over chosen blocks, with a row of blocks that chooses none."""
    for s, rows in ((160, 64), (256, 128), (130, 32)):
        q, k, v = (f32(1, 2, s, 64).half() for _ in range(3))
        blocks = torch.tensor(rng.integers(0, 2, (1, 2, -(-s // rows), -(-s // 128))))
        blocks[0, 0, 0] = 0
        want = block_sparse(q.float(), k.float(), v.float(), blocks, rows, 128, 0.125)
        got, _ = torch_npu.npu_block_sparse_attention(
            q.npu(), k.npu(), v.npu(), blocks.to(torch.int8).npu(), [rows, 128],
            q_input_layout="BNSD", kv_input_layout="BNSD", num_key_value_heads=2,
            scale_value=0.125, inner_precise=4 if A5 else 0,
        )  # fmt: skip
        close([got], [want], 2e-3)


def check_ffn():
    """Two products with an activation, of one expert and of several."""
    activations = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
    for name, function in activations.items():
        x, w1, w2 = f32(6, 16).half(), f32(16, 32).half(), f32(32, 16).half()
        want = function(x.float() @ w1.float()).half().float() @ w2.float()
        close([torch_npu.npu_ffn(x.npu(), w1.npu(), w2.npu(), name)], [want], 2e-2)
    x, w1, w2 = f32(6, 16).half(), f32(3, 16, 32).half(), f32(3, 32, 16).half()
    want = torch.cat([
        F.relu(rows.float() @ w1[e].float()).half().float() @ w2[e].float()
        for e, rows in enumerate(x.split([1, 3, 2]))
    ])  # fmt: skip
    got = torch_npu.npu_ffn(x.npu(), w1.npu(), w2.npu(), "relu", expert_tokens=[1, 3, 2])
    close([got], [want], 2e-2)


def check_graph_operators():
    """What torch_npu still sends over the graph-operator path on A2 and A3."""
    x, y = f32(3, 4, 5), f32(3, 4, 5)
    close([torch_npu.npu_slice(x.npu(), [1, 0, 2], [2, 3, 3])], [x[1:3, :3, 2:5]])
    close([torch_npu.fast_gelu(x.npu())], [x * torch.sigmoid(1.702 * x)])
    close([torch_npu.npu_silu(x.npu())], [F.silu(x)])
    close([torch_npu.npu_transpose(x.npu(), (2, 0, 1))], [x.permute(2, 0, 1)])
    close([torch_npu.npu_broadcast(x[:, :1].npu(), (3, 4, 5))], [x[:, :1].expand(3, 4, 5)])
    values, places = torch_npu.npu_max(x.npu(), 1)
    close([values, places], [x.max(1).values, x.max(1).indices])
    image, kernel, bias = f32(2, 4, 6, 5), f32(6, 2, 3, 3), f32(6)
    got = torch_npu.npu_conv2d(image.npu(), kernel.npu(), bias.npu(), [2, 1], [1, 0], [1, 1], 2)
    close([got], [F.conv2d(image, kernel, bias, (2, 1), (1, 0), 1, 2)])
    close([torch_npu.npu_bmmV2(x.npu(), y.transpose(1, 2).contiguous().npu(), [])],
          [x @ y.transpose(1, 2)])  # fmt: skip


def good_rotation():
    return dict(dy=f32(1, 2, 3, 8), cos=f32(1, 1, 3, 8), sin=f32(1, 1, 3, 8), x=None, mode=0,
                dx=empty(1, 2, 3, 8), dcos=None, dsin=None)  # fmt: skip


check_rotary_gradient()
check_slices()
check_dropout()
check_block_sparse()
if A5:
    check_hyper_connection_gradients()
    check_pre_gradients()
else:
    check_ragged()
    check_apply_rotary()
    check_ffn()
    check_graph_operators()
refuse("aclnnRotaryPositionEmbeddingGrad", good_rotation, "'sin'", sin=f32(1, 1, 2, 8))
refuse("aclnnRotaryPositionEmbeddingGrad", good_rotation, "'mode'", mode=4)
narrow = dict(cos=f32(1, 1, 3, 6), sin=f32(1, 1, 3, 6))
refuse("aclnnRotaryPositionEmbeddingGrad", good_rotation, "'cos'", **narrow)
x, out = f32(2, 2).npu(), empty(2, 2)
refused(
    "aclnnStridedSlice",
    lambda: call("aclnnStridedSlice", x, [0], [2], [0], 0, 0, 0, 0, 0, out),
    "a stride of 0",
)
