"""`parity --replay`: a good bundle is judged good, a wrong number is found and named,
and no file makes a traceback.
"""

import json
import os
import shlex

import pytest
import torch
from bundles import edited, run, with_bytes, with_text

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


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Bundles by pattern, each recorded when it is asked for first."""
    folder, made = tmp_path_factory.mktemp("bundles"), {}

    def record(capsys, pattern):
        if pattern not in made:
            made[pattern] = folder / f"{len(made)}.safetensors"
            assert run(capsys, "parity", "-k", pattern, "--record", made[pattern])[0] == 0
        return made[pattern]

    return record


@pytest.fixture
def norm(capsys, recorded):
    return recorded(capsys, "rms_norm/")


@pytest.fixture
def target(tmp_path):
    return tmp_path / "b.safetensors"


def replay(capsys, path, *options):
    """(exit code, rows by operator, totals) of a replay as JSON."""
    code, out, err = run(capsys, "parity", "--replay", path, "--json", *options)
    assert err == ""
    report = json.loads(out)
    return code, {row["operator"]: row for row in report["operators"]}, report


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


def first(manifest):
    return manifest["cases"][0]


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
    assert len(cases) == count if count else 0 < len(cases) <= 18
    assert "--profile" not in options or {profile for profile, _ in cases} == {"official"}


def test_a_pattern_that_selects_nothing_is_2(capsys, norm):
    assert run(capsys, "parity", "--replay", norm, "-k", "hadamard")[0] == 2


def header_of(length, rest=b"{}"):
    return lambda raw: length.to_bytes(8, "little") + rest


BROKEN = {
    "empty": lambda raw: b"",
    "three bytes": lambda raw: raw[:3],
    "cut in the header": lambda raw: raw[:200],
    "cut in the data": lambda raw: raw[:-5],
    "one byte more": lambda raw: raw + b"\0",
    "zeros": lambda raw: bytes(len(raw)),
    "noise": lambda raw: bytes((i * 7919) % 251 for i in range(5000)),
    "zip": lambda raw: b"PK\x03\x04" + raw,
    "pickle": lambda raw: b"\x80\x04\x95" + raw,
    "html": lambda raw: b"<!doctype html><html>",
    "largest header": header_of(2**64 - 1),
    "header of 2^63": header_of(2**63),
    "header of 0": header_of(0),
    "not UTF-8": header_of(4, b"{\xff\xfe}"),
    "no JSON": header_of(4, b'{"a}'),
    "a list": header_of(2, b"[]"),
    "deep": header_of(20_000, b'{"a":' + b"[" * 19_995),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_one_line(capsys, norm, target, kind):
    with_bytes(norm, target, BROKEN[kind])
    refused(capsys, target)


def refused(capsys, path, said=""):
    code, out, err = run(capsys, "parity", "--replay", path)
    assert (code, out) == (2, ""), (out, err)
    assert len(err.splitlines()) == 1, err
    assert f"--replay: {path} is no bundle that can be judged: " in err
    assert said in err
    assert err.isprintable() or err[:-1].isprintable()


TEXTS = {
    None: "found no 'dsv4_ascend_parity' in its metadata",
    "": "malformed JSON",
    "[]": "the manifest: found [], expected an object",
    "{}": "the manifest: format: found nothing",
    '{"format":2}': "found format 2, expected 1",
    '{"format":true}': "expected a whole number",
    '{"format":1,"format":1}': "found",
    '{"format":1,"machine":3}': "the manifest: machine: found 3, expected an object",
    '{"format":NaN}': "found",
    '{"format":"\ud800"}': "UTF-8",
    '{"format":' + "[" * 100_000: "nested",
}


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: str(text)[:20])
def test_a_wrong_manifest_is_one_line(capsys, norm, target, text):
    if text and "\ud800" in text:
        text = text.encode("unicode_escape").decode()
        with_text(norm, target, text)
        refused(capsys, target, "the manifest: format: found '\\ud800'")
        return
    with_text(norm, target, text)
    refused(capsys, target, TEXTS[text])


MEMBERS = {
    "machine: torch: found 7, expected text": lambda m: m["machine"].update(torch=7),
    "machine: software: found 'no', expected true or false": lambda m: m["machine"].update(
        software="no"
    ),
    "machine: chip: found [], expected text": lambda m: m["machine"].update(chip=[]),
    "pattern: found None, expected text": lambda m: m.update(pattern=None),
    "complete: found 1, expected true or false": lambda m: m.update(complete=1),
    "cases: found {}, expected a list": lambda m: m.update(cases={}),
    "cases[0]: found 5, expected an object": lambda m: m.update(cases=[5]),
    "cases[0]: operator: found nothing": lambda m: first(m).pop("operator") and None,
    "runs[0]: outputs: found 'y', expected a list": lambda m: first(m)["runs"][0].update(
        outputs="y"
    ),
    "runs[0]: outputs[0]: found 3, expected text": lambda m: first(m)["runs"][0].update(
        outputs=[3]
    ),
    "runs[0]: seconds: found '1', expected a number": lambda m: first(m)["runs"][0].update(
        seconds="1"
    ),
    "arguments[0]: found 'x', expected null or one of": lambda m: first(m)["arguments"].__setitem__(
        0, "x"
    ),
    "arguments[0]: found {'list': []}, expected null": lambda m: first(m)["arguments"].__setitem__(
        0, {"list": []}
    ),
    "arguments[2]: found 'x', expected a number as text": lambda m: first(m)[
        "arguments"
    ].__setitem__(2, {"float": "x"}),
    "left_out[0]: reason: found nothing": lambda m: m["left_out"].append({"name": "a"}),
}


@pytest.mark.parametrize("said", MEMBERS)
def test_a_member_of_another_kind_is_one_line(capsys, norm, target, said):
    with edited(norm, target) as (_, manifest):
        MEMBERS[said](manifest)
    refused(capsys, target, said)


@pytest.mark.parametrize("what", ["absent", "folder", "pipe"])
def test_what_is_no_file_is_one_line(capsys, tmp_path, what):
    path = tmp_path / what
    if what == "folder":
        path.mkdir()
    if what == "pipe":
        os.mkfifo(path)
    refused(capsys, path)


def test_a_terminal_obeys_no_bundle(capsys, norm, target):
    bad = "\x1b[2J\x07[bold]\u202e\ud800\nnew line"
    with edited(norm, target) as (_, manifest):
        first(manifest).update(operator=bad)
        manifest["cases"][1].update(case=bad)
        manifest["cases"][2]["runs"][0].update(implementation=bad, error=bad)
        manifest["machine"].update(chip=bad, cann=bad, dsv4_ascend=bad)
        manifest["left_out"].append({"name": bad, "reason": bad})
    code, out, err = run(capsys, "parity", "--replay", target)
    assert (code, err) == (1, "")
    assert all(line.isprintable() for line in out.splitlines())
    assert "\\x1b[2J" in out
    assert "[bold]" in out
    assert replay(capsys, target)[0] == 1


def test_a_measure_is_told_forms_first(capsys, recorded, target):
    """Its NumPy code would raise what nobody expects on other shapes."""
    sample = replaying.Sample(
        OPERATORS["lightning_indexer"], next(OPERATORS["lightning_indexer"].iterate_cases())
    )
    assert isinstance(sample.case, Case)
    comparison = sample.judge((torch.zeros(3, dtype=torch.int32),))
    assert comparison.detail.startswith("got shape [3], want")
    assert not sample.judge(()).ok
