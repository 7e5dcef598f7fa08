"""aclnnMixedQuantSparseFlashMla and its metadata (docs/spec/ascend-operators.md 4.11 E, 7; see
v4_mla.py). A5; elsewhere they are refused.
"""

import ml_dtypes
import numpy as np
import torch
import v4_mla
import v4_quant_cache
from fused_check import A5, Steps, array, check, distance, problems, refused, rng, same
from v4_mla import FAULTS, P_IN_BF16, attend, case_of, expect_rounding, metadata_of
from v4_paged import int32, with_gaps
from v4_quant_cache import quantised, write_kv

NAME = "aclnnMixedQuantSparseFlashMla"
E4M3, E8M0, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu, ml_dtypes.bfloat16
rounded = v4_mla.rounded

STEPS = Steps(
    **vars(v4_mla.STEPS),
    parts=lambda row: (row[128:576], row[576:590].view(BF16), row[:128].view(BF16)),
    block=lambda page, size, row: (
        page[row * 576 :][:448],
        page[size * 576 + row * 8 :][:7].view(E8M0),
        page[row * 576 + 448 :][:128].view(BF16),
    ),
    repeat=lambda scales: np.repeat(scales, 64),
    dequantised=rounded,
)


def numbers(pool, mode, steps):
    """[pages, rows, 1, 512] of a pool of bytes."""
    pages = pool.reshape(len(pool), -1)
    result = np.zeros((*pool.shape[:2], 1, 512))
    for page, row in np.ndindex(pool.shape[:2]):
        if mode == 1:
            values, scales, rope = steps.parts(pool[page, row, 0])
        else:
            values, scales, rope = steps.block(pages[page], pool.shape[1], row)
        values = values.view(E4M3).astype(np.float64) * steps.repeat(scales.astype(np.float64))
        result[page, row, 0] = np.concatenate([steps.dequantised(values), rope.astype(np.float64)])
    return torch.tensor(result)


def formula(case, steps):
    read = {
        name: numbers(case[name].numpy(), case["quant_mode"], steps)
        for name in ("ori_kv", "cmp_kv")
        if name in case
    }
    with np.errstate(invalid="ignore"):
        return v4_mla.in_table(case | read, steps)


def rows_of_bytes(count):
    """Rows of quantMode 1 whose scales are no powers of two."""
    nope = (rng.standard_normal((count, 448)) * 100).clip(-448, 448).astype(E4M3).view(np.uint8)
    scales = (rng.random((count, 7)) / 100 + 0.001).astype(BF16).view(np.uint8)
    rope = rng.standard_normal((count, 64)).astype(BF16).view(np.uint8)
    padding = np.full((count, 18), 0xFF, np.uint8)
    return torch.tensor(np.concatenate([rope, nope, scales, padding], -1))[:, None]


def in_blocks(pool):
    """Pages of quantMode 2 with the same values and rounded scales."""
    pages, size = pool.shape[:2]
    old = pool.numpy()[:, :, 0]
    result = np.full((pages, size * 584), 0xFF, np.uint8)
    body = np.concatenate([old[..., 128:576], old[..., :128]], -1)
    result[:, : size * 576] = body.reshape(pages, -1)
    scales = np.ascontiguousarray(old[..., 576:590]).view(BF16).astype(np.float64)
    bytes_of = np.zeros((pages, size, 8), np.uint8)
    with np.errstate(invalid="ignore", divide="ignore"):
        bytes_of[..., :7] = np.nan_to_num(np.round(np.log2(np.abs(scales)) + 127), nan=255)
    result[:, size * 576 :] = bytes_of.reshape(pages, -1)
    return torch.tensor(result).view(pages, size, 1, 584)


def mixed(mode, *arguments, **named):
    case = case_of(*arguments, rows=rows_of_bytes, **named)
    if mode == 2:
        pools = {name: in_blocks(case[name]) for name in ("ori_kv", "cmp_kv") if name in case}
        case |= pools
    return case | dict(quant_mode=mode, rope_head_dim=64)


if A5:
    CASES = [
        mixed(1, 4, [200, 5, 131], [3, 1, 2]),
        mixed(2, 6, [20, 150], [2, 1]),
        mixed(1, 2, [700, 257], [2, 3], ratio=128, size=7),
        mixed(1, 64, [130, 44], [1, 2], ratio=4, topk=512),
        mixed(2, 2, [140, 44], [1, 2], ratio=4, topk=512, size=64),
    ]
    check(
        "mixed_quant_sparse_flash_mla",
        lambda case: attend(case, NAME),
        lambda case, steps: formula(case[0], steps),
        STEPS,
        [(case,) for case in CASES],
        FAULTS
        | {
            "rotated values last": dict(
                parts=lambda row: (row[:448], row[576:590].view(BF16), row[448:576].view(BF16))
            ),
            "scales of the next row": dict(
                block=lambda page, size, row: (
                    page[row * 576 :][:448],
                    page[size * 576 + (row + 1) % size * 8 :][:7].view(E8M0),
                    page[row * 576 + 448 :][:128].view(BF16),
                )
            ),
            "rows of 584": dict(
                block=lambda page, size, row: (
                    page[row * 584 :][:448],
                    page[row * 584 + 576 :][:7].view(E8M0),
                    page[row * 584 + 448 :][:128].view(BF16),
                )
            ),
            "scales interleaved": dict(repeat=lambda scales: np.tile(scales, 64)),
        },
        1e-2,
    )
    few = mixed(1, 16, [2, 3], [1, 1])
    values = few | {"ori_kv": numbers(few["ori_kv"].numpy(), 1, STEPS)}
    got = attend(few, NAME)[0]
    expect_rounding("mixed_quant_sparse_flash_mla", values, got, P_IN_BF16, {"P in fp32": {}})
    exact = few | {"ori_kv": numbers(few["ori_kv"].numpy(), 1, STEPS.but(dequantised=same))}
    share = v4_mla.differing(exact, got, v4_mla.STEPS.but(**P_IN_BF16))
    if share < 0.05:
        problems.append("mixed_quant_sparse_flash_mla: rows in bf16 cannot be told from fp32")

    base, hca, csa = CASES[0], CASES[2], CASES[3]
    v4_mla.refusals(NAME, base, csa)
    v4_mla.faults(NAME, base, hca, csa)
    v4_mla.metadata_refusals(NAME + "Metadata", base, csa)
    made = metadata_of(csa, NAME + "Metadata", quant_mode=1, rope_head_dim=64)
    for argument, changed in (
        ("quant_mode", dict(quant_mode=0)),
        ("rope_head_dim", dict(rope_head_dim=128)),
        ("ori_kv", dict(quant_mode=2)),
    ):
        refused(NAME, lambda c=changed: attend(csa, NAME, metadata=made, **c), f"'{argument}'")
    refused(
        NAME + "Metadata",
        lambda: metadata_of(csa, NAME + "Metadata", quant_mode=3, rope_head_dim=64),
        "'quant_mode'",
    )
    plain = metadata_of(csa)
    refused(NAME, lambda: attend(csa, NAME, metadata=plain), "'metadata': not what", 507015)
    for case in (CASES[1], CASES[3]):
        apart = attend(case, NAME, ori_kv=with_gaps(case["ori_kv"]))[0]
        if not torch.equal(apart.cpu(), attend(case, NAME)[0].cpu()):
            problems.append("mixed_quant_sparse_flash_mla: pages with gaps")

    def written_and_read():
        """Rows that aclnnKvCompressEpilog writes are what the attention reads, and exactly what
        quantising and dequantising gives (AO 12, item 10).
        """
        case = mixed(1, 2, [40], [1])
        rows = torch.tensor(rng.standard_normal((40, 512))).bfloat16()
        cache = torch.zeros(4, 16, 1, 608, dtype=torch.uint8).npu()
        write_kv(cache, rows, int32(range(40)))
        case |= dict(ori_kv=cache.cpu(), ori_block_table=int32([[0, 1, 2]]))
        groups = array(rows[:, :448]).reshape(40, 7, 64)
        values, scales = quantised(groups, v4_quant_cache.STEPS, True)
        want = np.concatenate(
            [(values.view(E4M3).astype(float) * scales).reshape(40, 448), array(rows[:, 448:])], 1
        )
        got = array(numbers(case["ori_kv"].numpy(), 1, STEPS)).reshape(64, 512)[:40]
        if not np.array_equal(got, want):
            problems.append("rows of kv_compress_epilog differ from quantised ones")
        error = distance(array(attend(case, NAME)[0]), formula(case, STEPS)[0])
        if not error < 1e-2:
            problems.append(f"rows of kv_compress_epilog are read with an error of {error}")

    written_and_read()
else:
    refused(NAME + "Metadata", lambda: metadata_of(
        v4_mla.base, NAME + "Metadata", quant_mode=1, rope_head_dim=64), "does not exist on"
    )  # fmt: skip
    here = mixed(1, 4, [20], [1])
    refused(NAME, lambda: attend(here, NAME, metadata=metadata_of(here)), "does not exist on")
