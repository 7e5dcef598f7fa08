"""The dialect of named faults: edits of arguments, results and steps,
and what is refused when a fault is declared.
"""

import pytest
import torch

from dsv4_backend import OPERATORS
from dsv4_backend.contract import PROFILES, Case, Operator, Tolerance, operator
from dsv4_backend.errors import Dsv4Error, ProofError
from dsv4_backend.faults import OUTPUT_FAULTS, Faults, replace_steps
from dsv4_backend.ops.attention import keys_share, near_positions, sparse_attention
from dsv4_backend.ops.compressor import compress
from dsv4_backend.ops.formats import block_scale, round_e4m3
from dsv4_backend.ops.norm import rms_norm
from dsv4_backend.ops.quant import act_quant, quantize_weight_fp8
from dsv4_backend.ops.swiglu import swiglu_quant
from dsv4_backend.ragged import slots
from dsv4_backend.tiles import by_tokens

SCHEMA = "made_up(Tensor x, Tensor? w, Tensor[] parts, int k) -> (Tensor y, Tensor ids)"


def made_up(x, w, parts, k):
    return x * k, torch.arange(len(x)) + len(parts)


@pytest.fixture
def faults():
    return Faults(SCHEMA, made_up)


@pytest.fixture
def arguments():
    return torch.ones(3, 4), None, [torch.ones(2), torch.zeros(2)], 5


def outcome(faults, name, arguments):
    return faults.all_faults()[name](*arguments)


def test_edits_by_name(faults, arguments):
    faults.wrong_arguments(
        {"other k": {"k": lambda k: k + 1}, "constants": {"k": 7, "x": torch.zeros(2, 4)}}
    )
    assert torch.equal(outcome(faults, "other k", arguments)[0], torch.full((3, 4), 6.0))
    assert torch.equal(outcome(faults, "constants", arguments)[0], torch.zeros(2, 4))


def test_no_function_gets_none_and_each_tensor_of_a_list_is_edited(arguments):
    seen = []
    spy = Faults(SCHEMA, lambda x, w, parts, k: seen.extend((x, w, parts)))
    spy.wrong_arguments({"both": dict.fromkeys(("w", "parts"), lambda t: t + 1)})
    outcome(spy, "both", arguments)
    assert seen[1] is None
    assert [part.tolist() for part in seen[2]] == [[2, 2], [1, 1]]


def test_an_edit_of_all_arguments(faults, arguments):
    faults.wrong_arguments({"length": lambda a: a._replace(k=len(a.x))})
    assert torch.equal(outcome(faults, "length", arguments)[0], torch.full((3, 4), 3.0))


def test_edits_of_results(faults, arguments):
    faults.wrong_results(
        {
            "by name": {"ids": lambda ids: -ids},
            "all": lambda a, y, ids: (y - a.k, ids),
        }
    )
    y, ids = outcome(faults, "by name", arguments)
    assert (float(y.sum()), ids.tolist()) == (60, [-2, -3, -4])
    y, ids = outcome(faults, "all", arguments)
    assert (float(y.sum()), ids.tolist()) == (0, [2, 3, 4])


@pytest.mark.parametrize("name", OUTPUT_FAULTS)
def test_every_output_has_its_faults(faults, arguments, name):
    right = made_up(*arguments)
    for place, prefix in enumerate(("", "ids: ")):
        wrong = outcome(faults, prefix + name, arguments)
        same = [torch.equal(got, want) for got, want in zip(wrong, right, strict=True)]
        changed = name != "one NaN" or place == 0  # integers hold no NaN
        if name == "tokens shifted by one" and place == 0:
            changed = False  # all rows of y are equal
        assert same == [place != i or not changed for i in range(2)]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu])
def test_codes_get_a_nan(dtype):
    codes = Faults("codes(Tensor x) -> Tensor", lambda x: x)
    (got,) = outcome(codes, "one NaN", [torch.ones(2, 3).to(dtype)])
    assert got.float().isnan().sum() == 1


def test_an_output_fault_is_left_out_with_a_reason(faults):
    faults.no_output_fault("ids: one NaN", "ids are integers")
    assert faults.left_out == {"ids: one NaN": "ids are integers"}
    assert "ids: one NaN" not in faults.all_faults()
    assert set(faults.left_out_faults()) == {"ids: one NaN"}
    assert len(faults.all_faults()) == 2 * len(OUTPUT_FAULTS) - 1


@pytest.mark.parametrize(
    ("declare", "reason"),
    [
        (
            lambda f: f.wrong_arguments({"typo": {"kk": 1}}),
            "fault 'typo' edits 'kk'; there are x, w, parts, k",
        ),
        (
            lambda f: f.wrong_results({"typo": {"id": 1}}),
            "fault 'typo' edits 'id'; there are y, ids",
        ),
        (
            lambda f: f.wrong_steps({"far": {round_e4m3: abs}}),
            "fault 'far' replaces round_e4m3, which",
        ),
        (
            lambda f: f.no_output_fault("nan", "why"),
            "fault 'nan' is no output fault; there are last token zero, ",
        ),
        (lambda f: f.fault("one NaN")(abs), "fault 'one NaN' is defined twice"),
        (
            lambda f: [f.wrong_arguments({"a": {"k": 1}}) for _ in range(2)],
            "fault 'a' is defined twice",
        ),
        (
            lambda f: [f.fault("b")(abs), f.wrong_results({"b": {"y": abs}})],
            "fault 'b' is defined twice",
        ),
    ],
)
def test_what_is_no_fault_is_refused_when_it_is_declared(faults, declare, reason):
    with pytest.raises(ValueError, match=f"made_up: {reason}"):
        declare(faults)


def a_case(contract, name):
    return next(case.arguments for case in contract.iterate_cases() if case.name == name)


def test_a_step_is_replaced_wherever_it_is_called():
    """Called by a function of another module,
    by another operator's reference, inside a nested function.
    """
    gate_up = torch.ones(2, 128).bfloat16()
    coarse = replace_steps(
        swiglu_quant.reference, {block_scale: lambda b, *_: block_scale(b, 1.0, 1e-4)}
    )
    right, wrong = (
        swiglu_quant.reference(gate_up, gate_up, None, 10.0),
        coarse(gate_up, gate_up, None, 10.0),
    )
    assert not torch.equal(right[1].view(torch.uint8), wrong[1].view(torch.uint8))
    nothing = replace_steps(
        sparse_attention.reference, {near_positions: lambda t, w: near_positions(t, w) * 0 - 1}
    )
    call = a_case(sparse_attention, "window, one sequence")
    assert not nothing(*call).any()
    assert sparse_attention.reference(*call).any()
    seen = []
    spy = replace_steps(compress.reference, {slots: lambda *a: seen.append(a) or slots(*a)})
    right = compress.reference(*a_case(compress, "overlap, mixed"))
    assert torch.equal(spy(*a_case(compress, "overlap, mixed")), right)
    assert seen  # by way of the module `ragged`


def test_a_replacement_may_call_what_it_replaces_and_the_original_stays():
    call = a_case(sparse_attention, "window, decode")
    right = sparse_attention.reference(*call)
    same = replace_steps(sparse_attention.reference, {keys_share: lambda *a: keys_share(*a)})
    assert torch.equal(same(*call), right)
    half = replace_steps(sparse_attention.reference, {keys_share: lambda *a: keys_share(*a) / 2})
    assert torch.allclose(half(*call), right / 2)
    assert torch.equal(sparse_attention.reference(*call), right)


@pytest.mark.parametrize("step", [by_tokens, quantize_weight_fp8, sparse_attention.reference])
def test_a_step_that_is_not_called(step):
    with pytest.raises(
        LookupError, match=f"replaces {step.__name__}, which the reference does not call"
    ):
        replace_steps(act_quant.reference, {round_e4m3: abs, step: abs})


def unproved(**parts):
    contract = Operator("unproved(Tensor x) -> Tensor", (), lambda x: x, {}, Tolerance("none"))
    for part, given in parts.items():
        if part == "fault":
            contract.fault("left out")(given)
        else:
            getattr(contract, part)(given)
    return contract


PARTS = {"oracle": lambda x: x, "cases": lambda draw: iter(()), "fault": lambda x: x}


@pytest.mark.parametrize("missing", PARTS)
@pytest.mark.parametrize(
    "ask",
    [lambda c: c.faults, lambda c: c.golden, lambda c: c.equivalents, lambda c: c.iterate_cases()],
)
def test_a_proof_without_a_part_is_none(missing, ask):
    contract = unproved(**{name: part for name, part in PARTS.items() if name != missing})
    expected = rf"dsv4::unproved is not proved: no @unproved\.{missing} in .*write it as"
    with pytest.raises(ProofError, match=expected):
        ask(contract)
    assert issubclass(ProofError, Dsv4Error)


def test_all_that_is_missing_is_named_at_once():
    with pytest.raises(
        ProofError, match=r"no @unproved.oracle and no @unproved.cases and no @unproved.fault"
    ):
        unproved().load_proof()
    unproved(**PARTS).load_proof()


def test_an_incomplete_operator_stops_its_family(monkeypatch):
    """Nothing of a family can be asked for while one of its operators has no oracle."""
    rms_norm.load_proof()
    monkeypatch.setattr(rms_norm, "make_golden", None)
    expected = r"dsv4::rms_norm is not proved: no @rms_norm.oracle in .*proofs/norm.py"
    with pytest.raises(ProofError, match=expected):
        OPERATORS["head_rms_norm"].iterate_cases()
    assert OPERATORS["rope"].faults


def test_a_family_without_a_proof(monkeypatch):
    monkeypatch.setattr(rms_norm, "_proof", "dsv4_backend.proofs.nothing_there")
    with pytest.raises(
        ProofError, match=r"rms_norm is not proved: no such module in .*proofs/nothing_there\.py"
    ):
        rms_norm.load_proof()


@pytest.mark.parametrize("profile", ["", "Ideal", "offical", "fp16", "ideal "])
def test_an_unknown_profile_is_refused(profile):
    expected = f"{profile!r} is no profile; profiles are {', '.join(PROFILES)}"
    for construct in (
        lambda: Case("a case", profile, ()),
        lambda: Tolerance("a reason", **{profile: (0.0, 1.0)}),
        lambda: Tolerance("a reason", ideal=(1.0, 0.0), **{profile: (0.0, 0.0)}),
        lambda: Tolerance("a reason").limits(profile),
    ):
        with pytest.raises(ValueError, match=expected):
            construct()


def test_a_profile_without_limits_is_bit_for_bit():
    tolerance = Tolerance("a reason", official=(0.5, 0.25))
    assert {name: tolerance.limits(name) for name in ("ideal", "official")} == {
        "ideal": (0.0, 0.0),
        "official": (0.5, 0.25),
    }
    assert all(PROFILES.values())


def test_a_declaration_refuses_an_unknown_profile_before_it_registers():
    with pytest.raises(ValueError, match="'ofiicial' is no profile"):
        operator(
            "nobody(Tensor x) -> Tensor",
            rows=(),
            arguments={},
            tolerance=Tolerance("why", ofiicial=(0, 0)),
        )
    assert "nobody" not in OPERATORS
