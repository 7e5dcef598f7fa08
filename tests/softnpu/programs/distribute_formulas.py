"""MC2 in NumPy over the inputs of all ranks: what each rank receives and what comes back, made of
steps that a planted fault replaces.
"""

import dataclasses
import os

import numpy as np
import torch
from fused_check import A5, Steps
from fused_formats import decode, encode
from seeds import seed

A2 = os.environ["SOFTNPU_SOC"].startswith("Ascend910B")
RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
H, LOCAL = 1024, 3
EXPERTS = LOCAL * RANKS
HALF = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclasses.dataclass
class Case:
    """What the ranks are given. `bs`: rows of each rank; `mask`: of a rank's choices, or None."""

    name: str
    bs: list
    k: int = 2
    ids: object = None  # of a random generator, BS and K
    parts: object = None  # weights times factors, for each choice; None: any weights
    mask: object = None
    dtype: torch.dtype = torch.bfloat16
    quant: int = 0
    smooth: bool = False
    prefix: bool = False
    shared: bool = False

    def global_bs(self):
        return 0 if len(set(self.bs)) == 1 else max(self.bs) * RANKS

    def of(self, owner):
        """x, ids, weights, mask, shared row and the smooth scales, as rank `owner` has them."""
        rng = np.random.default_rng(seed(f"{self.name} {owner}"))
        x = torch.tensor(rng.standard_normal((self.bs[owner], H)) * 3).to(self.dtype)
        if self.quant:
            x[0] = 0
        ids = self.ids or (lambda g, b, k: g.random((b, EXPERTS)).argsort(1)[:, :k])
        ids = torch.tensor(ids(rng, self.bs[owner], self.k), dtype=torch.int32)
        weights = rng.random(ids.shape) if self.parts is None else self.parts / factor(ids.numpy())
        weights = torch.tensor(weights, dtype=torch.float32)
        mask = None if self.mask is None else torch.tensor(self.mask(owner, *ids.shape))
        shared = torch.tensor(rng.standard_normal(x.shape)).to(self.dtype)
        smooth = np.random.default_rng(seed(self.name)).random((EXPERTS, H)) + 0.5
        return x, ids, weights, mask, shared, torch.tensor(smooth, dtype=torch.float32)


def rounded(x, kind):
    """fp32 values of that half format, ties to even."""
    x = np.float32(x)
    if kind == "fp16":
        return np.float32(np.float16(x))
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def cut(x, kind):
    return (np.float32(x).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def by_token(x, steps):
    with np.errstate(divide="ignore", invalid="ignore"):
        by = np.float32(steps.top) / np.abs(x).max(-1)
        codes = np.nan_to_num(steps.whole(x * by[:, None]))
        return np.clip(codes, -128, 127), np.float32(1) / by


def by_mx(x, steps):
    parts = x.astype(float).reshape(len(x), -1, 32)
    with np.errstate(divide="ignore"):
        exponent = np.floor(np.log2(np.abs(parts).max(-1))) - steps.largest
    exponent = np.maximum(exponent, -127)
    y = encode((parts * 2.0 ** -exponent[..., None]).reshape(x.shape), "e4m3")
    return y, exponent + 127


STEPS = Steps(
    owner=lambda expert: expert // LOCAL,
    order=lambda expert, sender, token, choice: (expert, sender, token, choice),
    active=lambda mask: mask,
    smoothed=lambda x, smooth, expert: x * smooth[expert],
    top=127,
    whole=np.rint,
    largest=8,
    counts=lambda counts, prefix: np.cumsum(counts) if prefix else counts,
    received=lambda counts: np.cumsum(counts.reshape(-1)),
    choices=lambda k: range(k),
    weight=np.float32,
    sum=lambda total, row: total + row,
    shared=lambda total, row: total + row,
    result=rounded,
)
FAULTS = {
    "experts dealt out": dict(owner=lambda expert: expert % RANKS),
    "rows by sender": dict(order=lambda expert, sender, token, choice: (sender, expert, token)),
    "senders backwards": dict(order=lambda expert, sender, token, choice: (expert, -sender, token)),
    "tokens backwards": dict(order=lambda expert, sender, token, choice: (expert, sender, -token)),
    "no mask": dict(active=np.ones_like),
    "mask of tokens": dict(active=lambda mask: np.broadcast_to(mask[:, :1], mask.shape)),
    "no smooth scale": dict(smoothed=lambda x, smooth, expert: x),
    "smooth scale of a local expert": dict(smoothed=lambda x, s, expert: x * s[expert % LOCAL]),
    "top 128": dict(top=128),
    "cut codes": dict(whole=np.trunc),
    "exponent of e5m2": dict(largest=15),
    "counts, not their sums": dict(counts=lambda counts, prefix: counts),
    "sums of counts": dict(counts=lambda counts, prefix: np.cumsum(counts)),
    "received by rank": dict(received=lambda counts: np.cumsum(counts.T.reshape(-1))),
    "received counts": dict(received=lambda counts: counts.reshape(-1)),
    "no weight": dict(weight=np.ones_like),
    "weight of a half": dict(weight=lambda w: rounded(w, "bf16")),
    "choices backwards": dict(choices=lambda k: range(k - 1, -1, -1)),
    "one choice less": dict(choices=lambda k: range(max(k - 1, 1))),
    "sum in halves": dict(sum=lambda total, row: rounded(total + row, "bf16")),
    "no shared row": dict(shared=lambda total, row: total),
    "shared row twice": dict(shared=lambda total, row: total + 2 * row),
    "result cut": dict(result=cut),
}
if A2:  # the pages have neither there
    for name in ("no shared row", "shared row twice", "mask of tokens"):
        del FAULTS[name]
if not A5:
    del FAULTS["exponent of e5m2"]


class World:
    """The inputs of all ranks as arrays, and what the formulas make of them."""

    def __init__(self, case, steps):
        self.case, self.steps, self.kind = case, steps, HALF[case.dtype]
        self.of = []
        for owner in range(RANKS):
            x, ids, weights, mask, shared, smooth = case.of(owner)
            active = np.ones(ids.shape, bool)
            if mask is not None:
                own = mask.numpy() if mask.dim() == 2 else mask.numpy()[:, None]
                active = steps.active(np.broadcast_to(own, ids.shape))
            self.of.append((x.float().numpy(), ids.numpy(), weights.numpy(), active,
                            shared.float().numpy(), smooth.numpy()))  # fmt: skip

    def arrivals(self, rank):
        """(expert, sender, token, choice) of the rows of that rank."""
        return sorted(
            (
                (int(ids[place]), sender, *place)
                for sender, (_, ids, _, active, *_) in enumerate(self.of)
                for place in np.argwhere(active).tolist()
                for place in [tuple(place)]
                if self.steps.owner(int(ids[place])) == rank
            ),
            key=lambda row: self.steps.order(*row),
        )

    def sent(self, expert, sender, token):
        """Row and scale (None: it has none) as they travel; one row at a time."""
        x, smooth = self.of[sender][0][token : token + 1], self.of[sender][-1]
        if self.case.quant == 0:
            return x[0], None
        if self.case.quant == 4:
            y, scale = by_mx(x, self.steps)
            return y[0], scale[0]
        if self.case.smooth:
            x = self.steps.smoothed(x, smooth, expert)
        y, scale = by_token(x, self.steps)
        return y[0], scale[0]

    def computed(self, expert, sender, token):
        """What an expert makes of a row: a power of two, so that no rounding hides a fault."""
        y, scale = self.sent(expert, sender, token)
        return self.steps.result(multiplied(y, scale, self.case.quant) * factor(expert), self.kind)

    def dispatched(self):
        rows = self.arrivals(RANK)
        sent = [self.sent(*row[:3]) for row in rows]
        counts = np.zeros((LOCAL, RANKS), int)
        for expert, sender, *_ in rows:
            counts[expert % LOCAL, sender] += 1
        result = [
            np.array([y for y, _ in sent]).reshape(len(rows), H),
            self.steps.counts(counts.sum(1), self.case.prefix),
            self.steps.received(counts),
        ]
        if self.case.quant:
            result.append(np.array([s for _, s in sent]).reshape(len(rows), -1))
        if A2:
            result.append(np.array([self.of[s][2][t, c] for _, s, t, c in rows]))
        return result

    def combined(self):
        _, ids, weights, active, shared, _ = self.of[RANK]
        result = []
        for token in np.nonzero(active.any(1))[0]:
            total = np.zeros(H, np.float32)
            for choice in self.steps.choices(self.case.k):
                if active[token, choice]:
                    row = self.computed(int(ids[token, choice]), RANK, token)
                    weight = self.steps.weight(weights[token, choice])
                    total = self.steps.sum(total, weight * row)
            if self.case.shared:
                total = self.steps.shared(total, shared[token])
            result.append(self.steps.result(total, self.kind))
        return np.array(result).reshape(-1, H)

    def results(self):
        return [*self.dispatched(), self.combined()]


def factor(expert):
    return np.float32(2.0) ** (expert % 5 - 2)


def multiplied(y, scale, quant):
    if quant == 4:
        values = decode(y.astype(np.uint8), "e4m3").reshape(*y.shape[:-1], -1, 32)
        return np.float32((values * 2.0 ** (scale[..., None] - 127.0)).reshape(y.shape))
    return np.float32(y) if scale is None else np.float32(y) * np.float32(scale)


def few(owner, b, k):
    """Of each rank the first tokens, of another number."""
    return np.arange(b) < b - 1 - owner % 2


CASES = [
    Case("uneven tokens", [3 + 2 * rank for rank in range(RANKS)], prefix=True),
    Case("a rank with none", [4] * RANKS, mask=lambda owner, b, k: np.full(b, owner != 1)),
    Case("all to one expert", [6] * RANKS, k=1,
         ids=lambda g, b, k: np.full((b, k), EXPERTS - 2)),
    Case("all to one rank", [5] * RANKS, k=3, ids=lambda g, b, k: np.tile([[2, 0, 1]], (b, 1)),
         dtype=torch.float16, prefix=True),
    Case("first tokens", [7] * RANKS, k=4, mask=few),
    Case("parts that cancel", [4] * RANKS, k=3, parts=np.float32([3e-8, 1, -1])),
    Case("int8", [5] * RANKS, k=3, quant=2),
    Case("int8, smooth scales", [4 + rank for rank in range(RANKS)], quant=2, smooth=True,
         dtype=torch.float16),
]  # fmt: skip
if not A2:
    CASES += [
        Case("choices", [6] * RANKS, k=3, shared=True,
             mask=lambda owner, b, k: np.arange(b * k).reshape(b, k) % (3 + owner) != 1),
    ]  # fmt: skip
if A5:
    CASES += [Case("MX", [5] * RANKS, k=3, quant=4, shared=True)]
