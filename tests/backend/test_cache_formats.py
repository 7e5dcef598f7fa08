"""Bytes of every cache format against spec/v4.md 6.5,
with offsets counted here and rounding by ml_dtypes.
"""

import math
import struct
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch

from dsv4_backend.errors import ArgumentError
from dsv4_backend.ops.cache import write_cache
from dsv4_backend.ops.cache_bytes import READS, WRITES
from dsv4_backend.ops.cache_formats import FORMATS
from dsv4_backend.ops.quant import act_qdq, fp4_qdq

CHANNELS = {
    "fp8_ds_mla": 512,
    "a5": 512,
    "kv_epilog": 512,
    "indexer_fp8": 128,
    "indexer_token_fp8": 128,
    "indexer_mxfp4": 128,
    "indexer_int8": 128,
}
ENTRY = {
    "fp8_ds_mla": 584,
    "a5": 640,
    "kv_epilog": 608,
    "indexer_fp8": 132,
    "indexer_token_fp8": 132,
    "indexer_mxfp4": 68,
    "indexer_int8": 130,
}
BLOCK_SIZES = (1, 3, 16, 64, 128)

every_format = pytest.mark.parametrize("name", CHANNELS)


def page_bytes(name, block_size):
    size = block_size * ENTRY[name]
    return math.ceil(size / 576) * 576 if name == "fp8_ds_mla" else size


def exponent(values, largest, floor):
    """Smallest e with 2^e * largest >= max |values|, in exact arithmetic."""
    amax = max(Fraction(float(np.abs(values).max())), Fraction(float(np.float32(floor))))
    e = -140
    while Fraction(2) ** e * largest < amax:
        e += 1
    return e


def e4m3(values, block):
    """(bytes of the values, exponents of the blocks)."""
    blocks = values.reshape(-1, block)
    exponents = [exponent(b, 448, 1e-4) for b in blocks]
    scaled = np.stack([b / np.float32(2.0**e) for b, e in zip(blocks, exponents, strict=True)])
    return scaled.astype(ml_dtypes.float8_e4m3fn).tobytes(), exponents


def latent(row):
    """(nope, rope, scales) bytes of a KV row fp32 [512]."""
    nope, exponents = e4m3(row[:448], 64)
    return nope, row[448:].astype(ml_dtypes.bfloat16).tobytes(), bytes(e + 127 for e in exponents)


def place_fp8_ds_mla(row, n, o):
    nope, rope, scales = latent(row)
    return {o * 576: nope, o * 576 + 448: rope, n * 576 + o * 8: scales}


def place_a5(row, n, o):
    nope, rope, scales = latent(row)
    return {o * 640: rope, o * 640 + 128: nope, o * 640 + 576: scales}


def place_kv_epilog(row, n, o):
    """Scales in bf16: the exponent's byte between a sign and seven bits of zeros; zeros behind."""
    nope, rope, scales = latent(row)
    wide = b"".join(struct.pack("<H", byte << 7) for byte in scales)
    return {o * 608: rope + nope + wide + bytes(18)}


def place_indexer_fp8(row, n, o):
    values, (e,) = e4m3(row, 128)
    return {o * 128: values, n * 128 + o * 4: struct.pack("<f", 2.0**e)}


def place_indexer_token_fp8(row, n, o):
    scale = np.float32(np.abs(row).max()) * np.float32(1 / 448)
    scaled = row * (np.float32(1) / scale) if scale else row
    codes = scaled.astype(ml_dtypes.float8_e4m3fn)
    return {o * 128: codes.tobytes(), n * 128 + o * 4: struct.pack("<f", scale)}


def place_indexer_mxfp4(row, n, o):
    exponents = [exponent(b, 6, 6 * 2.0**-126) for b in row.reshape(4, 32)]
    scaled = np.concatenate(
        [b / np.float32(2.0**e) for b, e in zip(row.reshape(4, 32), exponents, strict=True)]
    )
    codes = scaled.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    packed = bytes(int(low) | int(high) << 4 for low, high in codes.reshape(64, 2))
    return {o * 64: packed, n * 64 + o * 4: bytes(e + 127 for e in exponents)}


def place_indexer_int8(row, n, o):
    scale = np.float32(np.abs(row).max()) / np.float32(127)
    steps = np.rint(row / scale).astype(np.int8) if scale else np.zeros(128, np.int8)
    return {o * 128: steps.tobytes(), n * 128 + o * 2: np.float16(scale).tobytes()}


PLACE = {
    "fp8_ds_mla": place_fp8_ds_mla,
    "a5": place_a5,
    "kv_epilog": place_kv_epilog,
    "indexer_fp8": place_indexer_fp8,
    "indexer_token_fp8": place_indexer_token_fp8,
    "indexer_mxfp4": place_indexer_mxfp4,
    "indexer_int8": place_indexer_int8,
}
"""Name -> (row fp32, entries per page n, entry o) -> {page byte: data}."""


def expected_cache(name, cache, rows, slots, block_size):
    """The cache after the writes, byte by byte; everything else stays."""
    want = cache.numpy().copy()
    for row, slot in zip(rows.float().numpy(), slots.tolist(), strict=True):
        if slot >= 0:
            for start, data in PLACE[name](row, block_size, slot % block_size).items():
                want[slot // block_size, start : start + len(data)] = np.frombuffer(data, np.uint8)
    return torch.from_numpy(want)


def random_cache(name, blocks, block_size):
    return torch.randint(0, 256, (blocks, page_bytes(name, block_size)), dtype=torch.uint8)


def rows_of(name, count, dtype=torch.float32):
    """Rows of very different scale, the first all zero, the second below the floors."""
    rows = torch.randn(count, CHANNELS[name]) * torch.exp2(
        torch.randint(-10, 11, (count, 1)).float()
    )
    rows[:1] = 0.0
    rows[1:2] *= 1e-9
    return rows.to(dtype)


def test_the_table_is_the_one_of_the_spec():
    assert {form.name: form.entry_bytes for form in FORMATS} == ENTRY
    assert {form.name: form.codec.channels for form in FORMATS} == CHANNELS


@pytest.mark.parametrize(
    ("block_size", "page"), [(1, 1152), (2, 1728), (64, 37440), (72, 42048), (128, 74880)]
)
def test_mla_pages_are_padded_to_576(block_size, page):
    WRITES["fp8_ds_mla"](
        torch.zeros(1, page, dtype=torch.uint8),
        torch.randn(1, 512),
        torch.zeros(1, dtype=torch.int64),
        block_size,
    )
    for wrong in (page - 576, page + 576, block_size * 584 + 1):
        with pytest.raises(ArgumentError, match=f"write_cache_fp8_ds_mla.*cache.*{page}"):
            WRITES["fp8_ds_mla"](
                torch.zeros(1, wrong, dtype=torch.uint8),
                torch.zeros(0, 512),
                torch.zeros(0).long(),
                block_size,
            )


@every_format
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_at_shuffled_slots(name, block_size, dtype):
    blocks = max(2, 24 // block_size)
    count = min(12, blocks * block_size)
    slots = torch.randperm(blocks * block_size)[:count]
    slots[count // 2] = -1
    rows, cache = rows_of(name, count, dtype), random_cache(name, blocks, block_size)
    want = expected_cache(name, cache, rows, slots, block_size)
    WRITES[name](cache, rows, slots, block_size)
    assert torch.equal(cache, want)


@every_format
def test_ties_and_block_maxima(name):
    rows = torch.randn(5, CHANNELS[name])
    rows[0] = torch.randint(-12, 13, (CHANNELS[name],)) * 0.25
    rows[0, ::32] = 6.0
    rows[1, ::32] = 448.0
    rows[2, ::32] = math.nextafter(448.0, 449.0) + 2**-15
    rows[3] = torch.randint(-254, 255, (CHANNELS[name],)) * 0.5
    rows[3, ::32] = 127.0
    rows[4, ::32] = -6 * 2.0**-20
    cache, slots = random_cache(name, 1, 5), torch.tensor([2, 0, 4, 1, 3])
    want = expected_cache(name, cache, rows, slots, 5)
    WRITES[name](cache, rows, slots, 5)
    assert torch.equal(cache, want)


@every_format
def test_skipped_rows_and_no_rows_write_nothing(name):
    cache = random_cache(name, 2, 3)
    before = cache.clone()
    WRITES[name](cache, rows_of(name, 4), torch.full((4,), -1), 3)
    WRITES[name](cache, rows_of(name, 0), torch.zeros(0, dtype=torch.int64), 3)
    assert torch.equal(cache, before)
    assert READS[name](cache, torch.zeros(0, dtype=torch.int64), 3).shape == (0, CHANNELS[name])


@every_format
@pytest.mark.parametrize(
    ("slots", "message"),
    [([4, 1, 4], "4 more than once"), ([0, 6, 1], "6 at 1"), ([0, -2, 1], "-2 at 1")],
)
def test_bad_slots_are_refused_before_anything_is_written(name, slots, message):
    cache = random_cache(name, 2, 3)
    before = cache.clone()
    with pytest.raises(ArgumentError, match=f"write_cache_{name}.*'slots'.*{message}"):
        WRITES[name](cache, rows_of(name, 3), torch.tensor(slots), 3)
    assert torch.equal(cache, before)


@every_format
def test_reads_take_any_order_repeats_and_none(name):
    rows, slots = rows_of(name, 6), torch.randperm(8)[:6]
    cache = random_cache(name, 2, 4)
    WRITES[name](cache, rows, slots, 4)
    straight = READS[name](cache, slots, 4)
    assert straight.dtype == torch.float32
    mixed = READS[name](cache, torch.cat([slots.flip(0), torch.tensor([-1]), slots[:1]]), 4)
    assert torch.equal(
        mixed, torch.cat([straight.flip(0), torch.zeros(1, CHANNELS[name]), straight[:1]])
    )
    for slot in (8, -2):
        with pytest.raises(ArgumentError, match=f"read_cache_{name}.*'slots'.*{slot} at 0"):
            READS[name](cache, torch.tensor([slot]), 4)


@every_format
def test_rows_do_not_depend_on_block_size_or_slot(name):
    rows = rows_of(name, 6)
    found = []
    for block_size in BLOCK_SIZES:
        blocks = math.ceil(6 / block_size) + 1
        cache, slots = (
            random_cache(name, blocks, block_size),
            torch.randperm(blocks * block_size)[:6],
        )
        WRITES[name](cache, rows, slots, block_size)
        found.append(READS[name](cache, slots, block_size))
    assert all(torch.equal(found[0], other) for other in found[1:])


def round_trip(name, rows):
    cache, slots = random_cache(name, 3, 16), torch.randperm(48)[: len(rows)]
    WRITES[name](cache, rows, slots, 16)
    return READS[name](cache, slots, 16)


@pytest.mark.parametrize("name", ["fp8_ds_mla", "a5", "kv_epilog"])
def test_kv_rows_come_back_as_after_qdq(name):
    rows = rows_of(name, 40, torch.bfloat16)
    assert torch.equal(round_trip(name, rows), act_qdq(rows, 64, 448).float())


def test_indexer_rows_come_back_as_after_qdq():
    rows = rows_of("indexer_fp8", 40, torch.bfloat16)
    assert torch.equal(round_trip("indexer_fp8", rows), act_qdq(rows, 128, 128).float())
    assert torch.equal(round_trip("indexer_mxfp4", rows), fp4_qdq(rows, 32).float())


def error_bound(name, rows):
    """Half a step of each format at each value."""
    if name == "indexer_int8":  # half a step, and fp16's rounding of the scale times the value
        amax = rows.abs().amax(1, keepdim=True)
        return amax / 254 + rows.abs() * 2**-10 + 127 * 2**-25
    if name == "indexer_mxfp4":  # steps of s/2 below 2s, then at most 2/5 of the value
        scale = 2 * rows.unflatten(1, (4, 32)).abs().amax(2, keepdim=True) / 6
        return torch.maximum((scale / 4).expand(-1, -1, 32).flatten(1), rows.abs() / 5)
    tile = 128 if "fp8" in name and "mla" not in name else 64
    scale = 2 * rows.unflatten(1, (-1, tile)).abs().amax(2, keepdim=True).clamp(min=1e-4) / 448
    bound = torch.maximum((scale * 2**-10).expand(-1, -1, tile).flatten(1), rows.abs() * 2**-4)
    if tile == 64:
        bound[:, 448:] = rows[:, 448:].abs() * 2**-8
    return bound


@every_format
def test_round_trip_errors_are_within_half_a_step(name):
    rows = rows_of(name, 48)
    assert (
        (round_trip(name, rows) - rows).abs().le(error_bound(name, rows) * (1 + 1e-6) + 1e-38).all()
    )


@every_format
def test_not_a_number_stays_visible(name):
    rows = rows_of(name, 4)
    rows[2, 5] = math.nan
    rows[3, 5] = math.inf
    found = round_trip(name, rows)
    assert found[2:, 5].isnan().all()
    assert found[:2].isfinite().all()


# --- plain rows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_rows_at_shuffled_slots(block_size, dtype):
    cache = torch.randn(4, block_size, 8).to(dtype)
    count = min(9, 4 * block_size)
    rows, slots = torch.randn(count, 8).to(dtype), torch.randperm(4 * block_size)[:count]
    slots[1] = -1
    want = cache.clone()
    for row, slot in zip(rows, slots.tolist(), strict=True):
        if slot >= 0:
            want[slot // block_size, slot % block_size] = row
    write_cache(cache, rows, slots)
    assert torch.equal(cache, want)


@pytest.mark.parametrize(
    ("slots", "message"),
    [([5, -1, 5], "5 more than once"), ([0, 8, 1], "8 at 1"), ([0, 1, -2], "-2 at 2")],
)
def test_bad_slots_of_plain_rows_are_refused(slots, message):
    cache = torch.zeros(2, 4, 3)
    with pytest.raises(ArgumentError, match=f"write_cache.*'slots'.*{message}"):
        write_cache(cache, torch.ones(3, 3), torch.tensor(slots))
    assert not cache.any()


def test_rows_of_another_dtype_are_refused():
    with pytest.raises(ArgumentError, match=r"write_cache.*'rows'.*bfloat16.*float32"):
        write_cache(
            torch.zeros(2, 4, 3),
            torch.ones(1, 3, dtype=torch.bfloat16),
            torch.zeros(1, dtype=torch.int64),
        )


def test_gradients_of_plain_rows():
    """Written rows and kept cache rows have gradient 1,
    skipped rows and overwritten cache rows 0.
    """
    former, rows = torch.randn(2, 3, 2, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    cache = former.clone()
    write_cache(cache, rows, torch.tensor([4, -1, 0, -1]))
    cache.sum().backward()
    assert rows.grad[:, 0].tolist() == [1, 0, 1, 0]
    assert former.grad[..., 0].tolist() == [[0, 1, 1], [1, 0, 1]]
