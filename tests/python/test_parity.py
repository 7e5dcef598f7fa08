"""The comparison and the runners themselves: what they must see, and what they must let pass."""

import math

import pytest
import torch

from dsv4_ascend.parity import runner
from dsv4_ascend.parity.compare import compare
from dsv4_ascend.parity.faults import run_faults, run_mutants
from dsv4_ascend.parity.mutants import mutants
from dsv4_ascend.parity.report import Selection, measure, totals
from dsv4_ascend.parity.runner import Sample, left_out, mutated_arguments, run_cases, samples
from dsv4_backend import OPERATORS
from dsv4_backend.contract import Case
from dsv4_backend.errors import ArgumentError
from dsv4_backend.ops.norm import rms_norm

NAN, INF = float("nan"), float("inf")
LIMITS = (1e-3, 1e-2)


def f32(*values):
    return torch.tensor(values, dtype=torch.float32)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_limit_use_is_error_over_limit():
    result = compare(f32(1.0, 100.505), f32(1.0, 100.0), LIMITS)
    assert result.ok
    assert result.limit_use == pytest.approx(0.505 / 1.001, rel=1e-4)
    assert result.mean_use == pytest.approx(result.limit_use / 2)


def test_the_worst_element_is_named():
    got, want = torch.zeros(4, 5), torch.zeros(4, 5)
    got[1, 2], got[3, 4] = 0.5, 0.25
    result = compare(got, want, LIMITS)
    assert not result.ok
    assert result.pass_rate == pytest.approx(0.9)
    assert "worst at [1, 2]: got 0.5, want 0" in result.detail


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (f32(NAN), f32(1)),
        (f32(1), f32(NAN)),
        (f32(NAN), f32(INF)),
        (f32(INF), f32(-INF)),
        (f32(INF), f32(3e38)),
        (f32(3e38), f32(INF)),
        (f32(1), f32(1, 1)),
        (f32(1), torch.ones(1, 1)),
        (f32(1), torch.ones(1, dtype=torch.bfloat16)),
        (f64(1), f32(1)),
        (torch.ones(1, dtype=torch.bfloat16), f64(1)),
        (torch.ones(1, dtype=torch.int32), torch.ones(1, dtype=torch.int64)),
        (None, f32(1)),
        (f32(1), None),
    ],
)
def test_never_equal(got, want):
    result = compare(got, want, (1e30, 1e30))
    assert result.limit_use == INF
    assert not result.ok
    assert result.detail


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (f32(NAN, INF, -INF), f32(NAN, INF, -INF)),
        (f32(INF), f64(1e300)),
        (f32(1), f64(1)),
        (f32(), f32()),
        (None, None),
        (torch.tensor([True]), torch.tensor([True])),
    ],
)
def test_equal(got, want):
    assert compare(got, want, (0, 0)).ok


def test_zero_limits_demand_the_sign_of_zero():
    assert not compare(f32(-0.0), f32(0.0), (0, 0)).ok
    assert compare(f32(-0.0), f32(0.0), LIMITS).ok


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.int8, torch.int32]
)
def test_codes_are_compared_by_bits(dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    want = codes.view(dtype) if dtype.itemsize == 1 else codes.to(dtype)
    assert compare(want.clone(), want, (1e30, 1e30)).ok
    other = codes.flip(0)
    assert not compare(
        other.view(dtype) if dtype.itemsize == 1 else other.to(dtype), want, (1e30, 1e30)
    ).ok


def test_an_error_beside_a_zero_limit_is_infinite():
    assert compare(f32(1e-30), f32(0), (0, 0.1)).limit_use == INF


def sample(*arguments, profile="ideal"):
    return Sample(rms_norm, Case("made up", profile, arguments))


def test_ideal_is_compared_with_fp64():
    x = torch.full((1, 3), 1e-20)
    golden = sample(x, torch.ones(3), 0.0).golden[0]
    assert golden.dtype == torch.float64
    assert golden[0, 0] == pytest.approx(1)


def test_official_is_compared_with_the_reference_as_it_is():
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    assert sample(x, torch.ones(8), 1e-6, profile="official").golden[0].dtype == torch.bfloat16


def test_arguments_keep_their_strides_and_are_copies():
    x = torch.randn(4, 8)[:, ::2]
    seen = []

    def spy(*arguments):
        seen.extend(arguments)
        arguments[1].zero_()
        return rms_norm.reference(*arguments)

    weight = torch.ones(4)
    sample(x, weight, 1e-6).run(spy)
    assert seen[0].stride() == x.stride()
    assert torch.equal(weight, torch.ones(4))


def test_written_arguments_are_compared():
    operator = OPERATORS["write_cache"]
    assert mutated_arguments(operator) == (0,)
    writing = [s for s in samples(operator) if (s.case.arguments[2] >= 0).any()]
    assert writing
    assert not any(s.run(lambda *_: None).ok for s in writing)


def test_an_implementation_that_raises_is_a_failure():
    bad = Sample(rms_norm, Case("wrong width", "ideal", (torch.ones(2, 3), torch.ones(1), 1e-6)))
    results = list(run_cases([bad]))
    assert results
    assert all(
        math.isinf(r.comparison.limit_use) and "ArgumentError" in r.comparison.detail
        for r in results
    )


def faults(monkeypatch, mutant):
    monkeypatch.setattr(type(rms_norm), "faults", {"mutant": mutant})
    return next(run_faults(rms_norm))


def test_a_faithful_mutant_survives(monkeypatch):
    result = faults(monkeypatch, rms_norm.reference)
    assert not result.killed
    assert not result.raised


def test_a_mutant_that_refuses_survives(monkeypatch):
    def refuse(*_):
        raise ArgumentError("no")

    assert not faults(monkeypatch, refuse).killed


def test_a_mutant_that_crashes_is_killed_and_told_apart(monkeypatch):
    result = faults(monkeypatch, lambda x, weight, eps: torch.cat([x, x.new_ones(1)]))
    assert result.killed
    assert result.raised


def test_a_mutant_with_a_python_mistake_is_not_taken_for_a_fault(monkeypatch):
    with pytest.raises(TypeError):
        faults(monkeypatch, lambda x: x)


@pytest.mark.parametrize(
    ("operator", "mutant"),
    [
        # of another module
        ("compress", "closed_blocks: first[sequence] + row - before -> first[sequence] + row"),
        (
            "write_cache_indexer_int8",
            "_encode_int8: scale.clamp(max=largest) -> scale",
        ),  # in a record of a closure
        (
            "read_cache_indexer_mxfp4",
            "data_columns: block_size * width -> block_size",
        ),  # called by what a closure calls
    ],
)
def test_an_edit_takes_effect_wherever_the_reference_reaches_it(operator, mutant):
    contract = OPERATORS[operator]
    assert mutant in [m.name for m in mutants(contract)]
    (result,) = [f for f in run_mutants(contract, mutant, count=None) if f.fault == mutant]
    assert result.killed


def test_a_function_of_a_record_that_nobody_calls_is_not_edited():
    assert not [
        m.name for m in mutants(OPERATORS["read_cache_indexer_int8"]) if "_encode" in m.name
    ]
    assert not [
        m.name for m in mutants(OPERATORS["write_cache_indexer_int8"]) if "_decode" in m.name
    ]


@pytest.mark.parametrize(
    ("pattern", "operators", "part"),
    [
        ("rms_norm/ideal", ["rms_norm"], "ideal"),
        ("hc_head", ["hc_head", "hc_head_hf32"], ""),
        ("hc_head/fp64", ["hc_head"], "fp64"),
        ("fp64 streams", OPERATORS, "fp64 streams"),
        ("ideal/fp64 streams", OPERATORS, "ideal/fp64 streams"),
        ("no such case", OPERATORS, "no such case"),
    ],
)
def test_a_pattern_is_an_operators_or_looked_for_in_all(pattern, operators, part):
    selection = Selection(pattern)
    assert sorted(op.name for op in selection.operators()) == sorted(operators)
    assert selection.part == part


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("fp64 streams", {"hc_pre", "hc_post", "hc_head"}),
        ("ideal/fp64 streams", {"hc_pre", "hc_post", "hc_head"}),
        ("fp64 heads", {"grouped_output_projection"}),
        ("fp64, what fp32 cannot hold is left", {"mtp_combine"}),
    ],
)
def test_a_case_is_found_by_its_own_name(pattern, found):
    selection = Selection(pattern)
    reports = [measure(op, selection) for op in selection.operators()]
    assert {r.operator for r in reports if r.cases} == found
    assert all(pattern in c.name and c.comparison.ok for r in reports for c in r.cases)


FP64_CASES = [
    found
    for name in ("hc_head", "mtp_combine", "write_cache", "grouped_gemm")
    for found in samples(OPERATORS[name])
    if any(isinstance(a, torch.Tensor) and a.dtype == torch.float64 for a in found.case.arguments)
]


@pytest.mark.parametrize("found", FP64_CASES, ids=lambda found: found.name)
def test_fp64_cases_are_left_out_where_a_device_computes_in_none(found, monkeypatch):
    assert left_out(found, "cpu") is None
    monkeypatch.setattr(runner, "_computes_in_fp64", lambda device: False)
    reason = left_out(found, "npu").reason
    assert reason == "not on npu: fp64 arguments, and a cast to fp64 gives fp32"


def test_what_is_left_out_is_counted_and_only_that(monkeypatch):
    monkeypatch.setattr(runner, "_computes_in_fp64", lambda device: False)
    everything = list(samples(OPERATORS["hc_head"]))
    report = measure(OPERATORS["hc_head"], Selection("hc_head/"))
    assert [unfit.name for unfit in report.left_out] == ["hc_head/ideal/fp64 streams"]
    assert len({c.name for c in report.cases}) == len(everything) - 1
    assert totals([report])["left_out"] == len(report.to_json()["left_out"]) == 1


@pytest.mark.parametrize(
    ("operator", "mutant"),
    [
        ("sample", "sample: max(temperature, MIN_TEMPERATURE) -> temperature"),
        ("sample", "sample: MIN_TEMPERATURE -> MIN_TEMPERATURE * 2"),
        (
            "sample",
            "sample: max(temperature, MIN_TEMPERATURE) -> min(temperature, MIN_TEMPERATURE)",
        ),
        ("act_quant", "act_scale: ACT_FLOOR -> ACT_FLOOR * 2"),
    ],
)
def test_floors_and_named_constants_are_edited_too(operator, mutant):
    (result,) = [
        f for f in run_mutants(OPERATORS[operator], mutant, count=None) if f.fault == mutant
    ]
    assert result.killed
