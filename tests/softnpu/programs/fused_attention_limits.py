"""What FusedInferAttentionScore refuses, on each generation (see fused_attention.py)."""

import ctypes

import torch
import torch_npu
from fused_attention import TRIANGLE, arguments, paged
from fused_check import A5, bf16, f32, problems, refused

CALLS = {
    1: torch_npu.npu_fused_infer_attention_score,
    2: torch_npu.npu_fused_infer_attention_score_v2,
}


def call(query, key, value, options, form=2, extra=None):
    given = {
        name: x.npu() if isinstance(x, torch.Tensor) else x for name, x in (extra or {}).items()
    }
    CALLS[form](query.npu(), key.npu(), value.npu(), **arguments(options, form), **given)
    torch.npu.synchronize()


def base(query, key, value, options):
    call(query, key, value, options)  # accepted as it is
    return query, key, value, options


def limit(argument, case, here=True, *, form=2, extra=None, **changed):
    """`case` with something changed must be refused, naming the argument,
    on this chip if `here`, else accepted.
    """
    query, key, value, options = case
    tensors = [
        changed.pop(name, x) for name, x in (("query", query), ("key", key), ("value", value))
    ]
    options = {name: x for name, x in (options | changed).items() if x is not None}
    if here:
        refused(
            "fused_infer_attention_score",
            lambda: call(*tensors, options, form, extra),
            f"'{argument}'",
        )
    else:
        call(*tensors, options, form, extra)


grouped = base(
    bf16(2, 4, 3, 32), bf16(2, 2, 5, 32), bf16(2, 2, 5, 32), {"layout": "BNSD", "heads": 4, "kv": 2}
)
flat = base(bf16(3, 1, 96), bf16(3, 5, 96), bf16(3, 5, 96), {"layout": "BSH", "heads": 3, "kv": 3})
tokens = base(
    bf16(6, 4, 128),
    bf16(8, 2, 128),
    bf16(8, 2, 128),
    {
        "layout": "TND",
        "heads": 4,
        "kv": 2,
        "lengths": [2, 6],
        "key_lengths": [3, 8],
        "mask": TRIANGLE,
        "sparse": 3,
    },
)
blocks = base(*paged(bf16(2, 3, 256), 2, 128, 128, [130, 3], 3, layout="BSH", heads=2))
narrow = base(*paged(bf16(2, 3, 64), 2, 32, 128, [130, 3], 3, layout="BSH", heads=2))
decode = base(
    *paged(
        bf16(5, 16, 512),
        1,
        512,
        16,
        [40, 17],
        4,
        rope=True,
        layout="TND",
        heads=16,
        lengths=[1, 5],
        query_rope=bf16(5, 16, 64),
        mask=TRIANGLE,
        sparse=3,
    )
)
steps = base(
    *paged(bf16(2, 1, 16, 512), 1, 512, 16, [40, 17], 3, rope=True, layout="BSND", heads=16,
           query_rope=bf16(2, 1, 16, 64))
)  # fmt: skip
prefill = base(
    bf16(6, 2, 128),
    bf16(8, 2, 128),
    bf16(8, 2, 128),
    {
        "layout": "TND",
        "heads": 2,
        "lengths": [2, 6],
        "key_lengths": [3, 8],
        "query_rope": bf16(6, 2, 64),
    }
    | {"key_rope": bf16(8, 2, 64)},
)
sinks = base(
    bf16(2, 3, 4, 64),
    bf16(2, 3, 4, 64),
    bf16(2, 3, 4, 64),
    {"layout": "BSND", "heads": 4, "sink": bf16(4)},
)

# Dtypes, and what is not emulated
limit("query", grouped, query=f32(2, 4, 3, 32))
limit("query", grouped, query=f32(2, 4, 3, 32).to(torch.int8))
limit("query", grouped, query=f32(2, 4, 3, 32).to(torch.float8_e4m3fn))
limit("key", grouped, key=f32(2, 2, 5, 32).half())
limit("key", grouped, key=f32(2, 2, 5, 32).to(torch.int8), value=f32(2, 2, 5, 32).to(torch.int8))
limit("value", grouped, value=f32(2, 2, 5, 32).half())
limit("pseShift", grouped, pse=f32(2, 4, 3, 5).half())
limit("attenMask", grouped, mask=f32(2, 1, 3, 5))
limit("blockTable", blocks, table=blocks[3]["table"].long())
limit("learnableSink", sinks, sink=f32(4))
limit("learnableSink", sinks, sink=f32(4).half())
limit("queryRope", prefill, query_rope=f32(6, 2, 64))
limit("keyRope", prefill, key_rope=f32(8, 2, 64).half())
for name, option in (
    ("quantScale2", "quant_scale_out"),
    ("keyAntiquantScale", "dequant_scale_key"),
):
    limit(name, grouped, extra={option: f32(1)})
for name, option in (
    ("antiquantScale", "antiquant_scale"),
    ("queryPaddingSize", "query_padding_size"),
):
    limit(name, grouped, form=1, extra={option: torch.ones(1, dtype=torch.int64)})
limit("kvPaddingSize", grouped, form=1, extra={"kv_padding_size": torch.ones(1, dtype=torch.int64)})
limit("keySharedPrefix", grouped, form=1, extra={"key_shared_prefix": bf16(1, 2, 4, 32)})
limit("actualSharedPrefixLen", grouped, form=1, extra={"actual_shared_prefix_len": [3]})

# Ranks, strides, layouts, heads
limit("attenMask", grouped, mask=torch.zeros(5, dtype=torch.bool))
limit("attenMask", grouped, mask=torch.zeros(1, 2, 1, 3, 5, dtype=torch.bool))
limit("blockTable", blocks, table=blocks[3]["table"].view(-1))
limit("key", grouped, key=bf16(2, 5, 64))
limit("learnableSink", sinks, sink=bf16(1, 4))
limit("query", grouped, query=bf16(2, 3, 4, 32).transpose(1, 2))
limit("key", grouped, key=bf16(2, 5, 2, 32).transpose(1, 2))
limit(
    "inputLayout",
    grouped,
    layout="NSD",
    query=bf16(4, 3, 32),
    key=bf16(4, 5, 32),
    value=bf16(4, 5, 32),
    kv=4,
)
limit("inputLayout", grouped, layout="BNSD_NBSD")
limit("inputLayout", tokens, layout="TND_NTD")
limit("inputLayout", decode, layout="NTD", query=bf16(16, 5, 512), query_rope=bf16(16, 5, 64))
limit("query", grouped, heads=3)
limit("query", flat, heads=5)
limit("key", grouped, kv=4)
limit("numKeyValueHeads", grouped, kv=-2)
limit("key", grouped, key=bf16(1, 2, 5, 32), value=bf16(1, 2, 5, 32))
limit("key", grouped, key=bf16(2, 2, 5, 16))
limit("value", grouped, value=bf16(2, 2, 6, 32))
limit("numKeyValueHeads", flat, kv=2, key=bf16(3, 5, 64), value=bf16(3, 5, 64))
limit(
    "numKeyValueHeads",
    decode,
    key=bf16(7, 2, 16, 512),
    value=bf16(7, 2, 16, 512),
    key_rope=bf16(7, 2, 16, 64),
    kv=2,
)
limit("numHeads", decode, A5, heads=3, query=bf16(5, 3, 512), query_rope=bf16(5, 3, 64))
limit("numHeads", flat, not A5, heads=258, query=bf16(3, 1, 258 * 32))
limit("query", flat, query=bf16(65537, 1, 3), key=bf16(65537, 1, 3), value=bf16(65537, 1, 3))

# Head sizes
limit("query", grouped, query=bf16(2, 4, 3, 528), key=bf16(2, 2, 5, 528), value=bf16(2, 2, 5, 528))
limit(
    "query",
    grouped,
    not A5,
    query=bf16(2, 4, 3, 20),
    key=bf16(2, 2, 5, 20),
    value=bf16(2, 2, 5, 20),
)
limit("value", grouped, not A5, value=bf16(2, 2, 5, 16))
limit("value", grouped, value=bf16(2, 2, 5, 16), layout="BNSD_BSND")
limit("value", grouped, value=bf16(2, 2, 5, 16), lse=True)
limit("value", grouped, value=bf16(2, 2, 5, 16), pse=bf16(1, 4, 3, 5))
limit(
    "query",
    grouped,
    layout="BNSD_BSND",
    query=bf16(2, 4, 3, 20),
    key=bf16(2, 2, 5, 20),
    value=bf16(2, 2, 5, 20),
)
limit(
    "query",
    sinks,
    layout="BSND_BNSD",
    query=bf16(2, 3, 4, 32),
    key=bf16(2, 3, 4, 32),
    value=bf16(2, 3, 4, 32),
    sink=None,
)
limit("query", tokens, not A5, query=bf16(6, 4, 32), key=bf16(8, 4, 32), value=bf16(8, 4, 32), kv=4)
limit("query", prefill, query=bf16(6, 2, 64), key=bf16(8, 2, 64), value=bf16(8, 2, 64))
limit(
    "learnableSink", sinks, query=bf16(2, 3, 4, 32), key=bf16(2, 3, 4, 32), value=bf16(2, 3, 4, 32)
)

# Lengths
limit("actualSeqLengths", tokens, lengths=None)
limit("actualSeqLengthsKv", tokens, key_lengths=None)
limit("actualSeqLengths", tokens, lengths=[6, 2])
limit("actualSeqLengths", tokens, lengths=[2, 7])
limit("actualSeqLengths", tokens, A5, lengths=[2, 5])
limit("actualSeqLengthsKv", tokens, key_lengths=[3, 9])
limit("actualSeqLengthsKv", tokens, A5, key_lengths=[3, 7])
limit("actualSeqLengthsKv", tokens, key_lengths=[8])
limit("actualSeqLengthsKv", blocks, key_lengths=None)
limit("actualSeqLengthsKv", blocks, key_lengths=[130, 400])
limit("actualSeqLengthsKv", flat, key_lengths=[1, 2])
limit("actualSeqLengthsKv", flat, key_lengths=[1, -2, 3])
limit("actualSeqLengthsKv", flat, key_lengths=[6])
limit("actualSeqLengths", grouped, lengths=[4])
limit("actualSeqLengths", steps, not A5, lengths=[1, 1])

# Paged caches
limit("blockTable", blocks, table=blocks[3]["table"][:1])
limit("blockTable", blocks, table=torch.full((2, 3), -1, dtype=torch.int32))  # a kernel fault
limit("blockSize", blocks, block=64)
limit(
    "blockSize", blocks, block=24, key=bf16(9, 24, 256), value=bf16(9, 24, 256), key_lengths=[50, 3]
)
limit(
    "blockSize", narrow, block=64, key=bf16(9, 64, 64), value=bf16(9, 64, 64), key_lengths=[50, 3]
)
limit(
    "blockSize",
    narrow,
    block=1024,
    key=bf16(9, 1024, 64),
    value=bf16(9, 1024, 64),
    query=bf16(2, 1, 64),
)
limit("key", blocks, key=bf16(9, 1, 8, 128, 32))
limit("key", blocks, key=bf16(9, 3, 128, 128))
limit("key", blocks, key=bf16(9, 2, 16, 128, 8))
limit("value", blocks, value=bf16(1, 128, 256))
huge = [bf16(*s) for s in ((1, 1, 129 * 512), (2, 16, 129 * 512), (2, 16, 129 * 512))]
limit(
    "key",
    blocks,
    heads=129,
    kv=129,
    query=huge[0],
    key=huge[1],
    value=huge[2],
    block=16,
    key_lengths=[20],
    table=blocks[3]["table"][:1],
)
limit(
    "blockTable",
    steps,
    not A5,
    table=None,
    block=0,
    key_lengths=None,
    **dict(
        zip(("key", "value", "key_rope"), (bf16(2, 5, 1, w) for w in (512, 512, 64)), strict=True)
    ),
)
wide = [bf16(*s) for s in ((2, 3, 2 * 192), (9, 128, 2 * 192), (9, 128, 256))]
limit("blockTable", blocks, A5, query=wide[0], key=wide[1], value=wide[2])

# Masks, tokens before and after, precision
limit("sparseMode", grouped, sparse=5, mask=TRIANGLE)
limit("sparseMode", grouped, sparse=9, mask=TRIANGLE)
limit("sparseMode", tokens, not A5, sparse=2)
limit("sparseMode", decode, sparse=2)
if A5:
    limit("sparseMode", grouped, sparse=4, mask=TRIANGLE, value=bf16(2, 2, 5, 16))
limit("attenMask", grouped, sparse=3)
limit("attenMask", grouped, sparse=1)
limit("attenMask", grouped, sparse=3, mask=torch.ones(5, 5, dtype=torch.bool))
limit("attenMask", grouped, sparse=3, mask=TRIANGLE.logical_not())  # a kernel fault
limit("attenMask", tokens, sparse=0, mask=torch.zeros(1, 6, 8, dtype=torch.bool))
limit("attenMask", grouped, A5, mask=torch.zeros(3, 5, dtype=torch.bool))
limit("attenMask", grouped, mask=torch.zeros(2, 3, 4, dtype=torch.bool))
limit("attenMask", grouped, mask=torch.zeros(2, 2, 5, dtype=torch.bool))
limit("attenMask", grouped, mask=torch.zeros(3, 3, 5, dtype=torch.bool))
limit("attenMask", grouped, mask=torch.zeros(2, 2, 3, 5, dtype=torch.bool))
limit("attenMask", blocks, mask=torch.zeros(2, 3, 130, dtype=torch.bool))
limit("attenMask", sinks, layout="BSND_BNSD", mask=torch.zeros(3, 3, dtype=torch.bool))
limit("preTokens", grouped, sparse=4, mask=TRIANGLE, before=-2, after=1)
limit("preTokens", grouped, mask=torch.zeros(2, 3, 5, dtype=torch.bool), before=1, after=-2)
limit("innerPrecise", grouped, precise=4)
limit("innerPrecise", flat, not A5, precise=2)
limit("innerPrecise", tokens, not A5, precise=1)
limit("innerPrecise", sinks, A5, precise=1)

# Shifts, sinks, rotary parts, softmax_lse
limit("pseShift", tokens, pse=bf16(1, 4, 6, 8))
limit("pseShift", grouped, pse=bf16(3, 4, 3, 5))
limit("pseShift", grouped, pse=bf16(1, 2, 3, 5))
limit("pseShift", grouped, pse=bf16(1, 4, 2, 5))
limit("pseShift", grouped, pse=bf16(1, 4, 3, 4))
limit("learnableSink", sinks, sink=bf16(3))
limit("learnableSink", sinks, pse=bf16(1, 4, 3, 3))
limit("learnableSink", decode, sink=bf16(16))
limit("keyRope", prefill, key_rope=None)
limit("queryRope", prefill, query_rope=None)
limit("queryRope", prefill, query_rope=bf16(6, 2, 32))
limit("keyRope", prefill, key_rope=bf16(8, 2, 32))
limit("keyRope", decode, key_rope=bf16(3, 1, 16, 64))
limit("softmaxLseFlag", decode, not A5, lse=True)


def results():
    """Given results of a wrong shape."""
    query, key, value, options = grouped
    given = arguments(options | {"lse": True}, 2)
    for bad, argument in ((0, "attentionOut"), (1, "softmaxLse")):
        out = [bf16(2, 4, 3, 32).npu(), f32(2, 4, 3, 1).npu()]
        out[bad] = out[bad][:, :, :2].contiguous()
        refused(
            "fused_infer_attention_score",
            lambda out=out: CALLS[2].out(query.npu(), key.npu(), value.npu(), **given, out=out),
            f"'{argument}'",
        )


def unlimited():
    """Tokens beyond 32 bits are as many as there are."""
    query, key, value, options = grouped
    for mode in ({"sparse": 4, "mask": TRIANGLE}, {"mask": torch.zeros(2, 3, 5, dtype=torch.bool)}):
        results = [
            CALLS[2](
                query.npu(),
                key.npu(),
                value.npu(),
                **arguments(options | mode | {"before": n, "after": n}, 2),
            )[0]
            for n in (2**31 - 1, 2**63 - 1)
        ]
        if not torch.equal(*(result.cpu() for result in results)):
            problems.append(
                "fused_infer_attention_score: "
                "preTokens and nextTokens of 2^63 - 1 change the result"
            )


def versions():
    """V2 to V4 do not exist on Ascend 950, V5 only there: torch_npu never asks, others may."""
    library = ctypes.CDLL("libopapi.so")
    none, number = ctypes.c_void_p(), ctypes.c_int64(1)
    for version, pointers, numbers in ((4, 29, 14), (5, 31, 15)):
        call = getattr(library, f"aclnnFusedInferAttentionScoreV{version}GetWorkspaceSize")
        values = [number] * numbers
        values[1], values[4] = ctypes.c_double(1), ctypes.c_char_p(b"BSH")
        code = call(
            *[none] * pointers,
            *values,
            none,
            none,
            ctypes.byref(ctypes.c_uint64()),
            ctypes.byref(none),
        )
        want = 161002 if (version == 5) != A5 else 161001
        if code != want:
            problems.append(f"fused_infer_attention_score V{version}: {code} instead of {want}")


results()
unlimited()
versions()
print("fused_infer_attention_score: limits checked")
