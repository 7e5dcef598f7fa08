"""npu_moe_distribute_dispatch_v2 and npu_moe_distribute_combine_v2 of the unmodified torch_npu, on
the ranks of torchrun, against formulas in NumPy over the inputs of all ranks, bit for bit. Every planted fault replaces a step of the formulas: some rank must see it in some case.
"""

import dataclasses
import os
import sys

import aclnn
import numpy as np
import torch
import torch.distributed as dist
import torch_npu
from fused_check import A5, Steps, distance, problems, refused
from fused_formats import decode, encode
from seeds import seed

from softnpu import current

dist.init_process_group("hccl")
RANK, RANKS = dist.get_rank(), dist.get_world_size()
torch.npu.set_device(RANK)
A2 = os.environ["SOFTNPU_SOC"].startswith("Ascend910B")
# The documents want a communicator for these two alone.
MC2 = dist.new_group(list(range(RANKS)))
GROUP = MC2._get_backend(torch.device("npu")).get_hccl_comm_name(RANK)
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


def npu(x):
    return None if x is None else x.npu()


def attributes(case):
    """Of both calls."""
    return dict(global_bs=case.global_bs(), shared_expert_num=0)


def dispatch(case, **more):
    x, ids, weights, mask, _, smooth = case.of(RANK)
    return torch_npu.npu_moe_distribute_dispatch_v2(
        x.npu(), ids.npu(), GROUP, RANKS, RANK, EXPERTS,
        **attributes(case) | dict(
            x_active_mask=npu(mask), quant_mode=case.quant,
            scales=npu(smooth) if case.smooth else None,
            expert_scales=npu(weights) if A2 else None,
            expert_token_nums_type=0 if case.prefix else 1,
            y_dtype=torch.float8_e4m3fn if case.quant == 4 else None,
        ) | more,
    )  # fmt: skip


def combine(case, y, sent, **more):
    _, ids, weights, mask, shared, _ = case.of(RANK)
    return torch_npu.npu_moe_distribute_combine_v2(
        y.npu(), ids.npu(), sent[2], sent[4], weights.npu(), GROUP, RANKS, RANK, EXPERTS,
        **attributes(case) | dict(
            x_active_mask=npu(mask), expand_scales=sent[6] if A2 else None,
            shared_expert_x=npu(shared) if case.shared else None,
        ) | more,
    )  # fmt: skip


def of_experts(case, sent):
    """What this rank's experts make of the rows that it was sent, [A, H]."""
    rows, scale, counts = sent[0].cpu(), sent[1].cpu(), sent[3].cpu().numpy()
    counts = np.diff(counts, prepend=0) if case.prefix else counts
    n = counts.sum()
    y = (rows.view(torch.uint8) if case.quant == 4 else rows.float())[:n].numpy()
    if case.quant == 4:
        scale = scale.view(torch.uint8)
    scale = scale[:n].numpy() if case.quant else None
    if case.quant == 2:
        scale = scale[:, None]
    factors = np.repeat([factor(RANK * LOCAL + e) for e in range(LOCAL)], counts)[:, None]
    result = torch.full(rows.shape, float("nan"), dtype=case.dtype)  # no row behind them is read
    result[:n] = torch.tensor(multiplied(y, scale, case.quant) * factors).to(case.dtype)
    return result


def device(case):
    """The results of the device, as `World.results` has them."""
    sent = dispatch(case)
    n = int(sent[4][EXPERTS - 1])
    x = combine(case, of_experts(case, sent), sent).cpu().float().numpy()
    mask = case.of(RANK)[3]
    written = slice(None) if mask is None else mask.reshape(len(x), -1).any(1).numpy()
    rows = sent[0][:n].cpu()
    rows = rows.view(torch.uint8) if case.quant == 4 else rows.float()
    result = [rows.numpy(), sent[3].cpu().numpy(), sent[4][:EXPERTS].cpu().numpy()]
    if case.quant:
        scale = sent[1][:n].cpu()
        scale = scale.view(torch.uint8) if case.quant == 4 else scale
        result.append(scale.numpy().reshape(n, -1))
    if A2:
        result.append(sent[6][:n].cpu().numpy())
    return [*result, x[written]]


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


def check_all():
    got = [device(case) for case in CASES]

    def distances(steps):
        for case, found in zip(CASES, got, strict=True):
            wanted = World(case, steps).results()
            assert len(found) == len(wanted), case.name
            for place, (f, w) in enumerate(zip(found, wanted, strict=True)):
                yield case.name, place, distance(f, w)

    for name, place, d in distances(STEPS):
        if d != 0:
            problems.append(f"{name}: result {place} differs by {d:.3g}")
    seen = torch.tensor(
        [any(d > 0 for *_, d in distances(STEPS.but(**steps))) for steps in FAULTS.values()],
        dtype=torch.int32,
        device="npu",
    )
    dist.all_reduce(seen, dist.ReduceOp.MAX)  # by any rank
    for fault, by in zip(FAULTS, seen.tolist(), strict=True):
        if not by:
            problems.append(f"fault not caught: {fault}")
    print(f"distribute: {len(CASES)} cases, {len(FAULTS)} faults", flush=True)


def versions_agree():
    """V2 and V3, which torch_npu calls where V4 is absent, give the bits of V4."""
    case = CASES[-1] if A5 else CASES[6]
    sent = dispatch(case)
    y = of_experts(case, sent).npu()
    x = combine(case, y, sent)
    own, ids, weights, mask, shared, _ = (npu(t) for t in case.of(RANK))
    domain = dict(
        group_ep=GROUP, ep_world_size=RANKS, ep_rank_id=RANK, moe_expert_num=EXPERTS, group_tp="",
        tp_world_size=0, tp_rank_id=0, expert_shard_type=0, shared_expert_num=0,
        shared_expert_rank_num=0, global_bs=case.bs[0] * RANKS, comm_alg="",
    )  # fmt: skip
    for version in (2, 3):
        special = dict(zero_expert_num=0, copy_expert_num=0, const_expert_num=0)
        domain |= special if version == 3 else {}
        out = [torch.full_like(t.view(torch.uint8), 255).view(t.dtype) for t in sent if t.numel()]
        names = ("expand_x", "dynamic_scales", "assist_info_for_combine", "expert_token_nums",
                 "ep_recv_counts", "expand_scales")  # fmt: skip
        named = dict(zip(names, out, strict=True))
        aclnn.call(
            f"aclnnMoeDistributeDispatchV{version}", x=own, expert_ids=ids, x_active_mask=mask,
            expert_scales=weights if A2 else None, quant_mode=case.quant, expert_token_nums_type=1,
            **domain, **named,
        )  # fmt: skip
        found = torch.full_like(x, float("nan"))
        aclnn.call(
            f"aclnnMoeDistributeCombineV{version}", expand_x=y, expert_ids=ids,
            assist_info_for_combine=named["assist_info_for_combine"],
            ep_send_counts=named["ep_recv_counts"], expert_scales=weights, x_active_mask=mask,
            shared_expert_x=shared if case.shared else None, out_dtype=0, comm_quant_mode=0,
            group_list_type=0, x=found, **domain,
        )  # fmt: skip
        torch.npu.synchronize()
        n = int(sent[4][EXPERTS - 1])
        same = all(
            torch.equal(a[:n].cpu().view(torch.uint8), b[:n].cpu().view(torch.uint8))
            for a, b in ((named["expand_x"], sent[0]), (named["ep_recv_counts"], sent[4]))
        )
        if not same or not torch.equal(found.cpu(), x.cpu()):
            problems.append(f"V{version} differs from V4")


def refusals():
    """Every rank is refused before it sends anything, so that none waits."""
    good = Case("refused", [4] * RANKS)
    sent = dispatch(good)
    y = of_experts(good, sent)
    x, ids, *_ = good.of(RANK)
    combine(good, y, sent)  # what is planned below differs by one thing each

    def bad(argument, case=good, **more):
        refused("dispatch", lambda: dispatch(case, **more), argument, 561002)

    def bad_combine(argument, sent=sent, y=y, **more):
        refused("combine", lambda: combine(good, y, sent, **more), argument, 561002)

    def direct(argument, group=GROUP, ranks=RANKS, experts=EXPERTS, x=x, ids=ids, **more):
        refused("dispatch", lambda: torch_npu.npu_moe_distribute_dispatch_v2(
            x.npu(), ids.npu(), group, ranks, RANK, experts, shared_expert_num=0, **more,
        ), argument, 561002)  # fmt: skip

    direct("groupEp", group="nobody")
    direct("groupEp", group="")
    direct("epWorldSize", ranks=RANKS + 2, experts=RANKS + 2)
    direct("epWorldSize", ranks=1025, experts=1025)
    direct("moeExpertNum", experts=EXPERTS + 1)
    direct("moeExpertNum", experts=1026 * RANKS)
    direct("H", x=torch.zeros(4, 16, dtype=torch.bfloat16))
    direct("BS", x=torch.zeros(513, H, dtype=torch.bfloat16), ids=ids[:1].repeat(513, 1))
    direct("K", ids=torch.arange(17, dtype=torch.int32).repeat(4, 1), experts=20 * RANKS)
    direct("expertIds", ids=ids[:3])
    direct("groupTp", group_tp=GROUP)
    bad("quantMode", quant_mode=7)
    bad("quantMode", quant_mode=1)
    bad("commAlg", comm_alg="ring")
    bad("commAlg" if A5 else "epWorldSize", comm_alg="hierarchy")
    bad("tpWorldSize", tp_world_size=3)
    bad("expertShardType", expert_shard_type=1)
    bad("sharedExpertRankNum", shared_expert_num=1, shared_expert_rank_num=1)
    bad("zeroExpertNum", zero_expert_num=1)
    bad("performanceInfo", performance_info=torch.zeros(RANKS, dtype=torch.int64).npu())
    bad("globalBS", global_bs=3 * RANKS)
    bad("globalBS", global_bs=4 * RANKS + 1)
    bad("scales", scales=torch.ones(EXPERTS, H).npu())
    bad("scales", scales=torch.ones(LOCAL, H).npu(), quant_mode=2)
    bad("xActiveMask", x_active_mask=torch.ones(3, dtype=torch.bool).npu())
    if not A2:
        bad("expertScales", expert_scales=torch.ones(4, 2).npu())
        bad_combine("expandScales", expand_scales=sent[6])
    else:
        bad("xActiveMask", x_active_mask=torch.ones(4, 2, dtype=torch.bool).npu())
        bad_combine("sharedExpertX", shared_expert_x=x.npu())
    if not A5:
        bad("quantMode", quant_mode=4)
    os.environ["HCCL_BUFFSIZE"] = "0"
    bad("HCCL_BUFFSIZE")
    bad_combine("HCCL_BUFFSIZE")
    os.environ["HCCL_BUFFSIZE"] = "200"
    large = Case("large", [256] * RANKS, k=3)
    os.environ["HCCL_BUFFSIZE"] = "2"
    bad("HCCL_BUFFSIZE", case=large)
    del os.environ["HCCL_BUFFSIZE"]
    bad_combine("commQuantMode", comm_quant_mode=2)
    bad_combine("commQuantMode", comm_quant_mode=9)
    bad_combine("assistInfoForCombine", sent=[*sent[:2], sent[2][:-1], *sent[3:]])
    bad_combine("epSendCounts", sent=[*sent[:4], sent[4][:-1], *sent[5:]])
    bad_combine("expandX", y=y[:1])
    bad_combine("H", y=y[:, :16])
    if not torch.equal(combine(good, y, sent), combine(good, y, sent)):
        problems.append("combine after refusals differs")


check_all()
called = current().launches().keys()
if not {"aclnnMoeDistributeDispatchV4", "aclnnMoeDistributeCombineV4"} <= called:
    problems.append("torch_npu calls other functions than V4")
if "all" in sys.argv:
    versions_agree()
    refusals()
torch.npu.synchronize()
for problem in problems:
    print("PROBLEM", RANK, problem, flush=True)
print(f"distribute: rank {RANK} of {RANKS}, {len(problems)} problems", flush=True)
dist.destroy_process_group()
sys.exit(bool(problems))
