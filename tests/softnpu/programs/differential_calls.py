"""The random operator calls of differential.py, on the arguments of differential_data.py."""

import os

import torch
import torch.nn.functional as F
from differential_data import FLOATS, INTS, Pair, dim_of, floats, like, rng, values

UNARY = [
    torch.abs,
    torch.neg,
    torch.relu,
    torch.sign,
    torch.square,
    torch.logical_not,
    torch.isfinite,
    torch.isnan,
]
UNARY_FLOAT = [
    torch.exp,
    torch.sigmoid,
    torch.tanh,
    torch.sin,
    torch.cos,
    torch.rsqrt,
    torch.sqrt,
    torch.log,
    torch.floor,
    torch.ceil,
    torch.round,
    torch.trunc,
    torch.erf,
    torch.expm1,
    torch.log1p,
    torch.reciprocal,
    F.silu,
    F.gelu,
    F.softplus,
    torch.frac,
    lambda x: F.leaky_relu(x, 0.1),
    lambda x: F.elu(x),
]
if os.environ.get("SOFTNPU_SOC", "").startswith("Ascend950"):
    # Elsewhere torch_npu 2.13 drops the argument `approximate`.
    UNARY_FLOAT.append(lambda x: F.gelu(x, approximate="tanh"))
BINARY = [
    torch.add,
    torch.sub,
    torch.mul,
    torch.maximum,
    torch.minimum,
    torch.eq,
    torch.ne,
    torch.lt,
    torch.le,
    torch.gt,
    torch.ge,
]
BINARY_FLOAT = [
    torch.div,
    torch.atan2,
    torch.pow,
    lambda a, b: torch.lerp(a, b, 0.3),
    lambda a, b: torch.where(a > b, a, b),
]
REDUCE = [torch.sum, torch.mean, torch.amax, torch.amin]


def unary():
    if rng.random() < 0.4:
        p = Pair(rng.choice((*FLOATS, torch.int64, torch.int32)))
        return rng.choice(UNARY), [p], {}
    return rng.choice(UNARY_FLOAT), [floats()], {}


def binary():
    a = Pair(rng.choice((*FLOATS, torch.int64, torch.int32)))
    kind = rng.random()
    if kind < 0.3:
        b = (
            Pair(a.dtype, [], plain=True)
            if rng.random() < 0.5
            else Pair(rng.choice((*FLOATS, torch.int64)), [1] * rng.randint(0, 2), plain=True)
        )
    elif kind < 0.6:
        return rng.choice(BINARY), [a, rng.choice((2, 1.5, True))], {}
    else:
        b = like(a)
    return rng.choice(BINARY), [a, b], {}


def binary_float():
    a = floats()
    return rng.choice(BINARY_FLOAT), [a, like(a)], {}


def integers():
    a = Pair(rng.choice(INTS[:3]))
    b = Pair(a.dtype, [], plain=True)
    return rng.choice([torch.bitwise_and, torch.bitwise_or, torch.bitwise_xor]), [a, b], {}


def reduce():
    p = floats()
    if not p.cpu.numel() or not p.cpu.dim():
        return torch.sum, [p], {}
    return rng.choice(REDUCE), [p], {"dim": dim_of(p), "keepdim": rng.random() < 0.5}


def logical():
    p = Pair(torch.bool)
    return rng.choice([torch.any, torch.all]), [p], {"dim": dim_of(p)} if p.cpu.dim() else {}


def scan():
    p = Pair(rng.choice(FLOATS[:1] + INTS[:2]))
    return torch.cumsum, [p, dim_of(p)], {}


def order():
    n = rng.randint(1, 30)
    a = torch.randperm(n * 4).float().view(4, n)
    pair = Pair(torch.float32, [4, n], plain=True)
    pair.cpu, pair.npu = a, a.npu()
    k = rng.randint(1, n)
    return (
        rng.choice(
            [
                lambda x: torch.topk(x, k),
                lambda x: torch.sort(x, descending=True),
                lambda x: x.max(-1),
                lambda x: x.argmax(-1),
                lambda x: x.min(0),
            ]
        ),
        [pair],
        {},
    )


def index():
    p = Pair(shape=[rng.randint(1, 6), rng.randint(1, 6), rng.randint(1, 4)], plain=True)
    a, b, c = p.cpu.shape
    i = torch.randint(-a, a, (rng.randint(0, 4),))
    j = torch.randint(0, b, (rng.randint(0, 5),))
    one = torch.randint(0, b, i.shape)
    mask = torch.rand(a, b) > 0.5
    at = torch.randint(0, b, (a, rng.randint(1, 5), c))
    forms = [
        lambda x, d: x[i.to(d)],
        lambda x, d: x[:, j.to(d)],
        lambda x, d: x[i.to(d), one.to(d)],
        lambda x, d: x[mask.to(d)],
        lambda x, d: x[:, :, -1],
        lambda x, d: x.index_select(1, j.to(d)),
        lambda x, d: torch.gather(x, 1, at.to(d)),
        lambda x, d: x[..., None, :],
        lambda x, d: mask.to(d).nonzero(),
        lambda x, d: torch.masked_select(x, mask.to(d)[..., None]),
    ]
    form = rng.choice(forms)
    return lambda x: form(x, x.device), [p], {}


def write():
    p = Pair(rng.choice((*FLOATS, torch.int64)), [rng.randint(1, 6), rng.randint(2, 6)], plain=True)
    a, b = p.cpu.shape
    i = torch.randperm(a)[: rng.randint(0, a)]
    j = torch.randperm(b)[: rng.randint(1, b)]
    mask = torch.rand(a, b) > 0.5
    src = values((a, j.numel()), p.dtype)
    accumulate = torch.randint(0, a, (7,))
    rows = values((7, b), p.dtype)

    def form(name):
        def run(x):
            y, d = x.clone(), x.device
            if name == "rows":
                y[i.to(d)] = 3
            elif name == "columns":
                y[:, j.to(d)] = src.to(d)
            elif name == "mask":
                y[mask.to(d)] = 1
            elif name == "add":
                y.index_put_((accumulate.to(d),), rows.to(d), accumulate=True)
            elif name == "index_add":
                y.index_add_(0, accumulate.to(d), rows.to(d))
            elif name == "scatter":
                y.scatter_(1, j.expand(a, -1).contiguous().to(d), src.to(d))
            elif name == "scatter_value":
                y.scatter_(1, j.expand(a, -1).contiguous().to(d), 5)
            elif name == "fill":
                y.masked_fill_(mask.to(d), 2)
            elif name == "slice":
                y[:, 1:] = y[:, :1]
            return y

        return run

    return (
        form(
            rng.choice(
                [
                    "rows",
                    "columns",
                    "mask",
                    "add",
                    "index_add",
                    "scatter",
                    "scatter_value",
                    "fill",
                    "slice",
                ]
            )
        ),
        [p],
        {},
    )


def shape():
    p = Pair()
    q = like(p)
    d = dim_of(p)
    forms = [
        lambda x, y: x.contiguous(),
        lambda x, y: x.clone(),
        lambda x, y: x.reshape(-1),
        lambda x, y: torch.stack([x, y], 0),
        lambda x, y: x.float(),
        lambda x, y: x.to(torch.int32),
        lambda x, y: x.to(torch.bool),
        lambda x, y: x.half(),
    ]
    if p.cpu.dim():
        forms += [
            lambda x, y: torch.cat([x, y, x], d),
            lambda x, y: torch.flip(x, [d]),
            lambda x, y: torch.roll(x, 1, d),
            lambda x, y: x.repeat(*([2] * x.dim())),
            lambda x, y: F.pad(x, (1, 2)),
            lambda x, y: torch.cat([x[:0], x]),
        ]
    if p.cpu.dim() > 1:
        forms += [
            lambda x, y: torch.tril(x),
            lambda x, y: torch.triu(x, 1),
            lambda x, y: x.transpose(0, 1).contiguous(),
        ]
    return rng.choice(forms), [p, q], {}


def product():
    dtype = torch.float32
    m, k, n, b = (rng.randint(1, 9) for _ in range(4))
    kind = rng.choice(["mm", "bmm", "matmul", "linear", "mv", "addmm", "baddbmm", "einsum", "t"])
    a = Pair(dtype, [m, k], plain=True)
    if kind == "bmm":
        return (
            torch.bmm,
            [Pair(dtype, [b, m, k], plain=True), Pair(dtype, [b, k, n], plain=True)],
            {},
        )
    if kind == "baddbmm":
        return (
            torch.baddbmm,
            [
                Pair(dtype, [b, m, n], plain=True),
                Pair(dtype, [b, m, k], plain=True),
                Pair(dtype, [b, k, n], plain=True),
            ],
            {},
        )
    if kind == "matmul":
        return (
            torch.matmul,
            [Pair(dtype, [b, 2, m, k], plain=True), Pair(dtype, [k, n], plain=True)],
            {},
        )
    if kind == "einsum":
        return (
            lambda x, y: torch.einsum("bmk,nk->bmn", x, y),
            [Pair(dtype, [b, m, k], plain=True), Pair(dtype, [n, k], plain=True)],
            {},
        )
    if kind == "linear":
        return F.linear, [a, Pair(dtype, [n, k], plain=True), Pair(dtype, [n], plain=True)], {}
    if kind == "mv":
        return torch.mv, [a, Pair(dtype, [k], plain=True)], {}
    if kind == "addmm":
        return torch.addmm, [Pair(dtype, [n], plain=True), a, Pair(dtype, [k, n], plain=True)], {}
    if kind == "t":
        return (
            lambda x, y: x.t() @ y,
            [Pair(dtype, [k, m], plain=True), Pair(dtype, [k, n], plain=True)],
            {},
        )
    return torch.mm, [a, Pair(dtype, [k, n], plain=True)], {}


def network():
    p = Pair(torch.float32, [rng.randint(1, 5), rng.randint(2, 8)], plain=True)
    n = p.cpu.shape[1]
    w, bias = values((n,), torch.float32), values((n,), torch.float32)
    target = torch.randint(0, n, (p.cpu.shape[0],))
    table = torch.randint(0, p.cpu.shape[0], (rng.randint(0, 4), 2))
    forms = [
        lambda x, d: F.softmax(x, -1),
        lambda x, d: F.log_softmax(x, 0),
        lambda x, d: F.layer_norm(x, (n,), w.to(d), bias.to(d)),
        lambda x, d: F.rms_norm(x, (n,), w.to(d)),
        lambda x, d: F.cross_entropy(x, target.to(d)),
        lambda x, d: F.embedding(table.to(d), x),
        lambda x, d: F.mse_loss(x, x * 2),
        lambda x, d: torch.linalg.vector_norm(x, dim=-1),
        lambda x, d: x.var(-1),
        lambda x, d: x.std(0),
        lambda x, d: torch.logsumexp(x, -1),
        lambda x, d: F.one_hot(target.to(d), n),
        lambda x, d: F.smooth_l1_loss(x, x + 1),
    ]
    form = rng.choice(forms)
    return lambda x: form(x, x.device), [p], {}


def create():
    n = rng.randint(0, 9)
    dtype = rng.choice(FLOATS + INTS[:2])
    forms = [
        lambda d: torch.zeros(n, 2, device=d, dtype=dtype),
        lambda d: torch.ones(n, device=d, dtype=dtype),
        lambda d: torch.full((n,), 3, device=d, dtype=dtype),
        lambda d: torch.arange(n, device=d),
        lambda d: torch.arange(1, 2 * n + 2, 2, device=d, dtype=dtype),
        lambda d: torch.eye(n + 1, device=d),
        lambda d: torch.linspace(0, 1, n + 1, device=d),
    ]
    form = rng.choice(forms)
    return lambda x: form(x.device), [Pair(torch.float32, [1], plain=True)], {}


MAKERS = [
    unary,
    unary,
    binary,
    binary,
    binary_float,
    integers,
    reduce,
    logical,
    scan,
    order,
    index,
    index,
    write,
    write,
    shape,
    shape,
    product,
    network,
    create,
]
