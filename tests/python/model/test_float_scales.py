"""F32 scales that are no powers of two: read as they are,
through every product, against a formula in NumPy.
"""

import numpy as np
import pytest
import torch
from drafter_checkpoints import PLAIN, hub, put
from seeds import generator
from tiny_checkpoints import random_tensors

import dsv4_ascend
from dsv4_ascend.checkpoint.folder import open_checkpoint
from dsv4_ascend.checkpoint.layout import FP8, layout
from dsv4_ascend.weights.activations import FP8_BLOCKS, UNQUANTISED
from dsv4_ascend.weights.experts import Experts, ExpertStack
from dsv4_ascend.weights.formats import FloatScaled, FloatScaledExperts, widened
from dsv4_ascend.weights.linear import Linear

E2M1 = np.array(
    [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32
)
IDS = list(range(11))


def draw(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed))


def fp8_weight(n, k, seed=0):
    """(e4m3 [n, k], F32 scales of its tiles, none a power of two)."""
    weight = draw(n, k, seed=seed).to(torch.float8_e4m3fn)
    return weight, draw(-(-n // 128), -(-k // 128), seed=seed + 1).abs() + 0.3


def fp4_weight(n, k, seed=0):
    codes = torch.randint(-128, 128, (n, k // 2), generator=generator(seed), dtype=torch.int8)
    return codes, draw(n, k // 32, seed=seed + 1).abs() + 0.3


def formula(weight, scale):
    """fp32 [N, K], element by element."""
    scales = scale.numpy()
    if weight.dtype == torch.int8:
        packed = weight.view(torch.uint8).numpy()
        values = np.stack([E2M1[packed & 15], E2M1[packed >> 4]], -1).reshape(len(packed), -1)
        return values * np.repeat(scales, 32, 1)
    values = weight.float().numpy()
    n, k = values.shape
    return values * scales[np.arange(n)[:, None] // 128, np.arange(k)[None] // 128]


def quantised(x):
    """What bf16 activations [T, K] become in profile official:
    e4m3 of blocks of 128 with power-of-two scales (6.1).
    """
    result = np.empty_like(x)
    for start in range(0, x.shape[1], 128):
        block = x[:, start : start + 128]
        amax = np.maximum(np.abs(block).max(1, keepdims=True), np.float32(1e-4))
        scale = np.exp2(np.ceil(np.log2(amax.astype(np.float64) / 448))).astype(np.float32)
        codes = torch.from_numpy(np.clip(block / scale, -448, 448)).to(torch.float8_e4m3fn)
        result[:, start : start + 128] = codes.float().numpy() * scale
    return result


ACTIVATIONS = {torch.float32: UNQUANTISED, torch.bfloat16: FP8_BLOCKS}


def linear(weight, scale, activations):
    module = Linear(1, 1, activations)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    module.scale = torch.nn.Parameter(scale, requires_grad=False)
    return module


@pytest.mark.parametrize("make", [fp8_weight, fp4_weight])
@pytest.mark.parametrize(("n", "k"), [(1, 32), (130, 160), (256, 384), (127, 128)])
def test_widened(make, n, k):
    weight, scale = make(n, k)
    assert np.array_equal(widened(weight, scale).numpy(), formula(weight, scale))


@pytest.mark.parametrize(("t", "n", "k"), [(0, 5, 128), (3, 130, 160), (7, 256, 384)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_product(t, n, k, dtype):
    weight, scale = fp8_weight(n, k)
    x = draw(t, k, seed=9).to(dtype)
    got = linear(weight, scale, ACTIVATIONS[dtype])(x)
    rows = x.float().numpy()
    want = (quantised(rows) if dtype == torch.bfloat16 else rows).astype(np.float64) @ formula(
        weight, scale
    ).T
    assert got.dtype == dtype
    limit = 1e-5 if dtype == torch.float32 else 2**-8
    assert np.abs(got.float().numpy() - want).max(initial=0) <= limit * max(
        1, np.abs(want).max(initial=0)
    )


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("make", [fp8_weight, fp4_weight])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routed_experts(make, dtype):
    """Three experts, one without rows;
    in profile official the product before w2 is quantised again.
    """
    d, m = 256, 128
    experts, values = Experts(3, d, m, ACTIVATIONS[dtype]), []
    for seed in range(3):
        parts = {name: make(*shape, seed=10 * seed + i) for i, (name, shape) in enumerate(
            {"w1": (m, d), "w2": (d, m), "w3": (m, d)}.items())}  # fmt: skip
        for name, (weight, scale) in parts.items():
            experts.put(seed, name, "weight", weight)
            experts.put(seed, name, "scale", scale / 16)
        values.append(
            {
                name: formula(weight, scale / 16).astype(np.float64)
                for name, (weight, scale) in parts.items()
            }
        )
    x, weights = (draw(5, d, seed=77) / 4).to(dtype), torch.rand(5) + 0.5
    offsets = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    got = experts(x, weights, offsets, 10.0).float().numpy()
    official = dtype == torch.bfloat16

    def narrow(y):
        return torch.from_numpy(y).bfloat16().double().numpy() if official else y

    rows = x.float().numpy()
    rows = quantised(rows) if official else rows
    for row in range(5):
        w = values[0 if row < 2 else 2]
        gate, up = (narrow(rows[row].astype(np.float64) @ w[name].T) for name in ("w1", "w3"))
        hidden = silu(np.minimum(gate, 10)) * np.clip(up, -10, 10) * weights[row].item()
        hidden = quantised(narrow(hidden)[None].astype(np.float32))[0] if official else hidden
        want = hidden.astype(np.float64) @ w["w2"].T
        # Official: a value of `hidden` beside a rounding edge may take the other e4m3 code, 2^-3 of
        # one of 128 terms.
        assert np.abs(got[row] - want).max() <= (0.03 if official else 1e-5) * np.abs(want).max()


def checkpoint(folder, expert, factor):
    """(folder, the tensors): every scale F32, of any value, or powers of two if `factor` is 1."""
    tensors = random_tensors(PLAIN, expert=expert)
    for name in [name for name in tensors if name.endswith(".scale")]:
        tensors[name] = tensors[name].float() * factor
    return put(folder, hub(expert_dtype=None), tensors), tensors


@pytest.mark.parametrize("expert", ["I8", FP8])
def test_a_model_equals_its_weights_widened(tmp_path, expert):
    """Profile ideal: the formula's fp32 weights in place of the scaled ones, drafts included."""
    folder, tensors = checkpoint(tmp_path / "scaled", expert, 1.1)
    scales = {entry.scale_name: name for name, entry in layout(PLAIN).items() if entry.scale_name}
    wide = {name: tensor for name, tensor in tensors.items() if name not in scales}
    for scale, name in scales.items():
        wide[name] = torch.from_numpy(formula(tensors[name], tensors[scale]))
    put(tmp_path / "wide", hub(expert_dtype=None), wide)
    ours, theirs = (
        dsv4_ascend.load(path, dtype=torch.float32) for path in (folder, tmp_path / "wide")
    )
    stored = [
        m.stored()
        for m in ours.network.modules()
        if isinstance(m, Linear | ExpertStack) and m.scale is not None
    ]
    assert {type(weight) for weight in stored} == {FloatScaled, FloatScaledExperts}
    want = theirs.forward(IDS)
    assert (ours.forward(IDS) - want).norm() <= 1e-4 * want.norm()
    options = {"draft_tokens": 2, "max_new_tokens": 6, "stop_ids": frozenset()}
    assert ours.generate([IDS], **options) == theirs.generate([IDS], **options)
    assert ours.draft_acceptance == theirs.draft_acceptance


@pytest.mark.parametrize("expert", ["I8", FP8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_powers_of_two_give_the_same_either_way(tmp_path, expert, dtype):
    """E8M0 scales through their own products,
    and the same numbers as fp32 scales: every part of both profiles.
    """
    folder, _ = checkpoint(tmp_path, expert, 1)
    model = dsv4_ascend.load(folder, dtype=dtype)
    options = {"draft_tokens": 2, "max_new_tokens": 6, "stop_ids": frozenset()}
    want, tokens, accepted = (
        model.forward(IDS),
        model.generate([IDS], **options),
        model.draft_acceptance,
    )
    for module in model.network.modules():
        if isinstance(module, Linear | ExpertStack) and module.scale is not None:
            module.scale = torch.nn.Parameter(module.scale.float(), requires_grad=False)
    assert torch.equal(model.forward(IDS), want)
    assert (model.generate([IDS], **options), model.draft_acceptance) == (tokens, accepted)


@pytest.mark.parametrize("expert", ["I8", FP8])
def test_powers_of_two_are_e8m0(tmp_path, expert):
    folder, tensors = checkpoint(tmp_path, expert, 1)
    for name, tensor in open_checkpoint(folder).tensors():
        if name.endswith(".scale"):
            assert tensor.dtype == torch.float8_e8m0fnu
            assert torch.equal(tensor.float(), tensors[name])


def test_other_values_stay_fp32(tmp_path):
    folder, tensors = checkpoint(tmp_path, FP8, 1.1)
    for name, tensor in open_checkpoint(folder).tensors():
        if name.endswith(".scale"):
            assert torch.equal(tensor, tensors[name])
