"""`parity --replay`: a good bundle is judged good, a wrong number is found and named,
and no file makes a traceback.
"""

import json
import shlex

import pytest
import torch
from bundles import edited, first, replay, run

from dsv4_ascend.parity import replay as replaying
from dsv4_backend import OPERATORS
from dsv4_backend.contract import Case
from dsv4_backend.ops.norm import rms_norm

RECORDED = (
    "rms_norm/",
    "write_cache/",
    "fp8_gemm/",
    "int8_token_quant/",
    "moe_dispatch/",
    "lightning_indexer/",
)


@pytest.mark.parametrize("pattern", RECORDED)
def test_what_was_good_there_is_good_here(capsys, recorded, pattern):
    path = recorded(capsys, pattern)
    _, out, _ = run(capsys, "parity", "-k", pattern, "--json")
    (here,) = json.loads(out)["operators"]
    code, rows, report = replay(capsys, path)
    (row,) = rows.values()
    assert code == 0
    assert report["absent"] == row["unjudged"] == row["other_inputs"] == []
    assert report["recorded"]["torch"] == torch.__version__
    assert report["recording"] == {"pattern": pattern, "profile": None, "complete": True}
    for result in (*row["results"], *here["results"]):
        del result["seconds"]
    assert row["results"] == here["results"]


def test_the_table_says_where_it_comes_from(capsys, norm):
    code, out, err = run(capsys, "parity", "--replay", norm)
    assert (code, err) == (0, "")
    first, *_, last = out.splitlines()
    assert first.startswith("recorded 20")
    assert "on cpu; dsv4-ascend 0.1.0, torch 2.13.0" in first
    assert "1 operators, " in last
    assert " 0 failed; " in last


# (bundle, part of the case's name, which output, edit of it)
WRONG = [
    ("rms_norm/", "ideal/17x130", 0, lambda y: y.view(-1)[37].add_(1e-2)),
    ("rms_norm/", "ideal/17x130", 0, lambda y: y.view(-1)[3].fill_(torch.nan)),
    ("rms_norm/", "official/17x130", 0, lambda y: y.view(-1)[5].mul_(1.1)),
    ("write_cache/", "official/512 channels, block 64", 0, lambda c: c.view(-1)[9].add_(1)),
    ("write_cache/", "ideal/7 rows to 3x4, 2 skipped", 0, lambda c: c.view(-1)[0].add_(1)),
    ("fp8_gemm/", "official/", 0, lambda y: y.view(-1)[0].add_(100)),
    ("int8_token_quant/", "a2a3-int8/2x3x130, bf16", 0, lambda q: q.view(-1)[11].bitwise_xor_(1)),
    ("int8_token_quant/", "a2a3-int8/2x3x130, bf16", 1, lambda s: s.view(-1)[1].mul_(1.01)),
    ("moe_dispatch/", "", 1, lambda offsets: offsets[-1].add_(1)),
    ("moe_dispatch/", "", 2, lambda order: order.copy_(order.flip(0))),
    ("lightning_indexer/", "ideal/mixed", 0, lambda ids: ids[-1, 0].copy_(ids[-1, 1])),
]


@pytest.mark.parametrize(("pattern", "part", "output", "edit"), WRONG)
def test_one_wrong_number_is_found_and_named(capsys, recorded, target, pattern, part, output, edit):
    source = recorded(capsys, pattern)
    with edited(source, target) as (tensors, manifest):
        case = next(c for c in manifest["cases"] if is_wanted(c, part, output, tensors))
        edit(tensors[case["runs"][0]["outputs"][output]])
    name = f"{case['operator']}/{case['profile']}/{case['case']}"
    code, rows, _ = replay(capsys, target)
    failed = [r for row in rows.values() for r in row["results"] if not r["ok"]]
    assert code == 1
    assert [(r["profile"], r["case"], r["implementation"]) for r in failed] == [
        (case["profile"], case["case"], case["runs"][0]["implementation"])
    ]
    code, out, _ = run(capsys, "parity", "--replay", target)
    (line,) = [line for line in out.splitlines() if line.startswith("FAIL")]
    assert line.startswith(f"FAIL {name}: {failed[0]['implementation']}: worst at [")
    again = shlex.split(line.split("  $ ")[1])
    code, out, _ = run(capsys, *again[1:])
    assert code == 1
    assert line.split(": ")[0] in out


def is_wanted(case, part, output, tensors):
    """The named case, with something to edit."""
    run_ = case["runs"][0]
    return part in f"{case['profile']}/{case['case']}" and tensors[
        run_["outputs"][output]
    ].numel() > (1 if not part else 0)


@pytest.mark.parametrize("index", [10**6, 2**31 - 1, -9, -(2**31)])
def test_indices_that_nothing_has_fail(capsys, recorded, target, index):
    """The measure reads scores at them."""
    with edited(recorded(capsys, "lightning_indexer/"), target) as (tensors, manifest):
        case = next(c for c in manifest["cases"] if c["case"] == "mixed")
        tensors[case["runs"][0]["outputs"][0]][-1, 0] = index
    code, out, err = run(capsys, "parity", "--replay", target)
    assert (code, err) == (1, "")
    assert "FAIL lightning_indexer/ideal/mixed: " in out


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu])
def test_one_wrong_code_is_found(capsys, recorded, target, dtype):
    source = recorded(capsys, "act_quant/")
    with edited(source, target) as (tensors, manifest):
        for case in manifest["cases"]:
            for one in case["runs"]:
                for name in one["outputs"]:
                    if tensors[name].dtype == dtype and tensors[name].numel():
                        tensors[name].view(torch.uint8).view(-1)[0].bitwise_xor_(1)
                        break
    code, rows, _ = replay(capsys, target)
    assert code == 1
    assert rows["act_quant"]["failed"] > 10


def set_output(make):
    """An edit of the first case that has values: another first output."""

    def edit(tensors, manifest):
        case = next(c for c in manifest["cases"] if tensors[c["runs"][0]["outputs"][0]].numel())
        name = case["runs"][0]["outputs"][0]
        tensors[name] = make(tensors[name])

    return edit


UNLIKE = {
    "got torch.float16, want": set_output(lambda y: y.half()),
    "got torch.uint8, want": set_output(lambda y: y.to(torch.uint8)),
    "got shape [1], want": set_output(lambda y: y.reshape(-1)[:1].clone()),
    "got shape [0], want": set_output(lambda y: y.reshape(-1)[:0].clone()),
    "got nothing, want Tensor": lambda t, m: first(m)["runs"][0].update(outputs=[None]),
    "got 2 outputs and written arguments, want 1": lambda t, m: first(m)["runs"][0][
        "outputs"
    ].append(None),
    "got 0 outputs and written arguments, want 1": lambda t, m: first(m)["runs"][0].update(
        outputs=[]
    ),
    "raised LaunchError: dsv4::rms_norm: aclnnRmsNorm": lambda t, m: first(m)["runs"][0].update(
        error="LaunchError: dsv4::rms_norm: aclnnRmsNorm", outputs=[]
    ),
}


@pytest.mark.parametrize("pattern", ["rms_norm/", "lightning_indexer/"])
@pytest.mark.parametrize("said", UNLIKE)
def test_outputs_of_another_form_fail(capsys, recorded, target, said, pattern):
    """Also where a measure of the operator's would take them apart."""
    with edited(recorded(capsys, pattern), target) as (tensors, manifest):
        UNLIKE[said](tensors, manifest)
    code, out, err = run(capsys, "parity", "--replay", target)
    (line,) = [line for line in out.splitlines() if line.startswith("FAIL")]
    assert (code, err) == (1, "")
    assert said in line


def x_of(tensors, manifest, edit):
    """Edit the first argument of the case with the most values; that case."""
    case = max(manifest["cases"], key=lambda c: tensors[c["arguments"][0]["tensor"]].numel())
    name = case["arguments"][0]["tensor"]
    tensors[name] = edit(tensors[name])
    return case


NOT_JUDGED = {
    "this version has no such operator": lambda t, m: first(m).update(operator="root_norm"),
    "this version has no such case": lambda t, m: first(m).update(case="9x9"),
    "has no such case": lambda t, m: first(m).update(profile="fast"),
    "no implementation ran it": lambda t, m: first(m).update(runs=[]),
    "tensor 'gone' is missing": lambda t, m: first(m)["runs"][0].update(outputs=["gone"]),
    "tensor 'no.x' is missing": lambda t, m: first(m)["arguments"].__setitem__(
        0, {"tensor": "no.x"}
    ),
    "found 1 arguments, expected 3": lambda t, m: first(m).update(arguments=[None]),
    "found nothing, expected torch.float32": lambda t, m: first(m)["arguments"].__setitem__(
        0, None
    ),
    "found int 3, expected float 1e-06": lambda t, m: first(m)["arguments"].__setitem__(
        2, {"int": 3}
    ),
    "found float nan, expected float 1e-06": lambda t, m: first(m)["arguments"].__setitem__(
        2, {"float": "nan"}
    ),
    "found torch.float64": lambda t, m: x_of(t, m, lambda x: x.double()),
    "found torch.float32 [1]": lambda t, m: x_of(t, m, lambda x: x.reshape(-1)[:1].clone().float()),
}


@pytest.mark.parametrize("said", NOT_JUDGED)
def test_what_cannot_be_judged_is_a_named_finding(capsys, norm, target, said):
    with edited(norm, target) as (tensors, manifest):
        NOT_JUDGED[said](tensors, manifest)
    code, out, err = run(capsys, "parity", "--replay", target)
    (line,) = [line for line in out.splitlines() if line.startswith("NOT JUDGED")]
    assert (code, err) == (1, "")
    assert said in line
    assert ", 1 not judged" in out
    code, rows, report = replay(capsys, target)
    assert (code, report["totals"]["unjudged"]) == (1, 1)
    (unjudged,) = [u for row in rows.values() for u in row["unjudged"]]
    assert said in unjudged["reason"]


def test_other_inputs_are_judged_by_the_oracle_and_counted(capsys, norm, target):
    with edited(norm, target) as (tensors, manifest):
        case = x_of(tensors, manifest, lambda x: x * 1.5)
        x, weight = (tensors[a["tensor"]] for a in case["arguments"][:2])
        for one in case["runs"]:
            tensors[one["outputs"][0]] = rms_norm.reference(
                x, weight, float(case["arguments"][2]["float"])
            )
    name = f"rms_norm/{case['profile']}/{case['case']}"
    code, rows, report = replay(capsys, target)
    assert (code, rows["rms_norm"]["other_inputs"]) == (0, [name])
    assert report["totals"]["failed"] == 0
    _, out, _ = run(capsys, "parity", "--replay", target)
    assert ", 1 on inputs that this machine draws otherwise" in out


def test_outputs_of_other_inputs_than_the_bundles_fail(capsys, norm, target):
    with edited(norm, target) as (tensors, manifest):
        case = x_of(tensors, manifest, lambda x: x.roll(1, -1))
    code, out, _ = run(capsys, "parity", "--replay", target)
    failing = [line for line in out.splitlines() if line.startswith("FAIL")]
    assert (code, len(failing)) == (1, len(case["runs"]))
    assert all(f"{case['case']}: " in line and ", on other inputs: " in line for line in failing)


@pytest.mark.parametrize(
    ("pattern", "argument"), [("write_cache/", 2), ("lightning_indexer/", 3), ("moe_dispatch/", 1)]
)
@pytest.mark.parametrize("value", [10**6, -7])
def test_indices_outside_are_refused_before_the_oracle(
    capsys, recorded, target, pattern, argument, value
):
    with edited(recorded(capsys, pattern), target) as (tensors, manifest):
        for case in manifest["cases"]:
            tensors[case["arguments"][argument]["tensor"]].fill_(value)
    code, out, err = run(capsys, "parity", "--replay", target)
    assert (code, err) == (1, "")
    assert f"NOT JUDGED {pattern}" in out
    assert "cannot be judged: dsv4::" in out


def test_whatever_an_oracle_raises_is_a_named_finding(capsys, norm, target, monkeypatch):
    with edited(norm, target) as (tensors, manifest):
        manifest["cases"] = [x_of(tensors, manifest, lambda x: x * 1.5)]
    for error in (ZeroDivisionError, OverflowError, KeyError, TypeError, AssertionError):

        def oracle(*arguments, error=error):
            raise error("odd")

        monkeypatch.setattr(rms_norm, "make_golden", oracle)
        code, out, _ = run(capsys, "parity", "--replay", target, "-k", "rms_norm")
        assert code == 1
        assert "NOT JUDGED rms_norm/" in out


def test_a_bundle_of_an_older_version_says_what_it_lacks(capsys, norm, target):
    with edited(norm, target) as (_, manifest):
        gone = first(manifest)["case"]
        del manifest["cases"][0]
        manifest["machine"]["dsv4_ascend"] = "0.0.7"
    code, out, _ = run(capsys, "parity", "--replay", target)
    assert code == 0
    assert "dsv4-ascend 0.0.7" in out
    assert "judged by the contracts of dsv4-ascend 0.1.0" in out
    assert "1 case(s) of this version are not in the bundle: rms_norm/" in out
    assert gone in out
    assert [name.endswith(gone) for name in replay(capsys, target)[2]["absent"]] == [True]


def test_an_interrupted_recording_says_so(capsys, norm, target):
    with edited(norm, target) as (_, manifest):
        manifest["complete"] = False
    assert "the recording was interrupted" in run(capsys, "parity", "--replay", target)[1]


def test_what_was_left_out_there_is_left_out_here(capsys, norm, target):
    with edited(norm, target) as (_, manifest):
        gone = manifest["cases"].pop(0)
        name = f"rms_norm/{gone['profile']}/{gone['case']}"
        manifest["left_out"].append({"name": name, "reason": "no fp64"})
    code, out, _ = run(capsys, "parity", "--replay", target)
    assert code == 0
    assert f"left out: {name}: no fp64" in out
    assert "are not in the bundle" not in out


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (("-k", "rms_norm/ideal/3x7"), 1),
        (("-k", "3x7"), 2),
        (("--profile", "official"), None),
        (("-k", "rms_norm"), None),
    ],
)
def test_patterns_and_profiles_select(capsys, norm, options, count):
    code, rows, _ = replay(capsys, norm, *options)
    cases = {(r["profile"], r["case"]) for r in rows["rms_norm"]["results"]}
    assert code == 0
    assert len(cases) == count if count else 0 < len(cases) <= 19
    assert "--profile" not in options or {profile for profile, _ in cases} == {"official"}


def test_a_pattern_that_selects_nothing_is_2(capsys, norm):
    assert run(capsys, "parity", "--replay", norm, "-k", "hadamard")[0] == 2


def test_a_measure_is_told_forms_first(capsys, recorded, target):
    """Its NumPy code would raise what nobody expects on other shapes."""
    sample = replaying.Sample(
        OPERATORS["lightning_indexer"], next(OPERATORS["lightning_indexer"].iterate_cases())
    )
    assert isinstance(sample.case, Case)
    comparison = sample.judge((torch.zeros(3, dtype=torch.int32),))
    assert comparison.detail.startswith("got shape [3], want")
    assert not sample.judge(()).ok
