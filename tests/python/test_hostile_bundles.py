"""Files that are no bundle, or a hostile one, in `parity --replay`: one line, never a traceback."""

import os

import pytest
from bundles import edited, first, replay, run, with_bytes, with_text


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
