"""`parity --record`: what a bundle holds, what is refused,
and that a file is whole or not there.
"""

import json
import os
import stat

import pytest
import torch
from bundles import loaded, run

from dsv4_ascend.checkpoint.safetensors_stream import SafetensorsStream
from dsv4_ascend.cli import parity as parity_command
from dsv4_ascend.parity import runner
from dsv4_ascend.parity.runner import implementations, samples
from dsv4_backend import OPERATORS
from dsv4_backend.ops.norm import rms_norm


@pytest.fixture
def bundle(tmp_path):
    return tmp_path / "a bundle.safetensors"


def test_a_bundle_names_what_ran_where(capsys, bundle):
    code, out, err = run(capsys, "parity", "-k", "rms_norm/", "--record", bundle)
    assert (code, err) == (0, "")
    assert f"--replay '{bundle}'" in out
    _, manifest = loaded(bundle)
    machine = manifest["machine"]
    assert machine["dsv4_ascend"] == "0.1.0"
    assert machine["torch"] == torch.__version__
    assert machine["isa"] in ("portable", "avx2", "avx512")
    assert machine["date"].endswith("+00:00")
    assert (machine["device"], machine["software"]) == ("cpu", False)
    assert (manifest["pattern"], manifest["profile"], manifest["complete"]) == (
        "rms_norm/",
        None,
        True,
    )
    recorded = [f"{c['operator']}/{c['profile']}/{c['case']}" for c in manifest["cases"]]
    assert recorded == [sample.name for sample in samples(rms_norm)]
    for case, sample in zip(manifest["cases"], samples(rms_norm), strict=True):
        assert [r["implementation"] for r in case["runs"]] == list(implementations(sample, "cpu"))


@pytest.mark.parametrize(
    "name", ["write_cache", "fp8_grouped_gemm", "moe_dispatch", "sample", "rope"]
)
def test_arguments_and_results_are_stored_bit_for_bit(capsys, bundle, name):
    """Written arguments before and after; None, numbers and every dtype as they are."""
    run(capsys, "parity", "-k", f"{name}/", "--record", bundle)
    tensors, manifest = loaded(bundle)
    for case, sample in zip(manifest["cases"], samples(OPERATORS[name]), strict=True):
        assert len(case["arguments"]) == len(sample.case.arguments)
        for stored, own in zip(case["arguments"], sample.case.arguments, strict=True):
            if isinstance(own, torch.Tensor):
                same(tensors[stored["tensor"]], own)
            elif own is None:
                assert stored is None
            else:
                ((kind, value),) = stored.items()
                assert (kind, type(own)(value)) == (type(own).__name__, own)
        for one in case["runs"]:
            (function,) = [
                f for n, f in implementations(sample, "cpu").items() if n == one["implementation"]
            ]
            got = sample.call(function)
            assert len(got) == len(one["outputs"])
            for stored, own in zip(one["outputs"], got, strict=True):
                same(tensors[stored], own)


def same(stored, own):
    assert (stored.dtype, stored.shape) == (own.dtype, own.shape)
    assert torch.equal(
        stored.reshape(-1).view(torch.uint8), own.contiguous().reshape(-1).view(torch.uint8)
    )


def test_the_contracts_use_no_kind_that_a_bundle_lacks():
    kinds = {
        a.dtype if isinstance(a, torch.Tensor) else type(a)
        for operator in OPERATORS.values()
        for case in operator.iterate_cases()
        for a in case.arguments
    }
    tensors = {kind for kind in kinds if isinstance(kind, torch.dtype)}
    assert {torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.uint8, torch.int8} <= tensors
    assert kinds - tensors <= {int, float, bool, type(None)}


def test_an_error_is_recorded(capsys, bundle, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("the vector core\nis on fire")

    monkeypatch.setattr(rms_norm, "reference", broken)
    code, *_ = run(capsys, "parity", "-k", "rms_norm/ideal/3x7", "--record", bundle)
    assert code == 1
    _, manifest = loaded(bundle)
    (reference,) = [r for r in manifest["cases"][0]["runs"] if r["implementation"] == "reference"]
    assert reference["error"] == "RuntimeError: the vector core\nis on fire"
    assert reference["outputs"] == []


def test_what_a_device_cannot_take_is_named(capsys, bundle, monkeypatch):
    monkeypatch.setattr(runner, "_computes_in_fp64", lambda device: False)
    run(capsys, "parity", "-k", "hc_head/", "--record", bundle)
    _, manifest = loaded(bundle)
    (unfit,) = manifest["left_out"]
    assert unfit["name"] == "hc_head/ideal/fp64 streams"
    assert "fp64" in unfit["reason"]


def test_a_profile_selects(capsys, bundle):
    run(capsys, "parity", "-k", "rms_norm", "--profile", "official", "--record", bundle)
    _, manifest = loaded(bundle)
    assert {case["profile"] for case in manifest["cases"]} == {"official"}
    assert manifest["profile"] == "official"


def test_an_interrupt_keeps_what_was_done(capsys, bundle, monkeypatch):
    measure = parity_command.measure

    def interrupted(operator, selection, observe):
        if operator.name == "head_rms_norm":
            measure(operator, selection, observe)
            raise KeyboardInterrupt
        return measure(operator, selection, observe)

    monkeypatch.setattr(parity_command, "measure", interrupted)
    code, *_ = run(capsys, "parity", "-k", "rms_norm", "--record", bundle)
    assert code == 130
    _, manifest = loaded(bundle)
    assert not manifest["complete"]
    assert {case["operator"] for case in manifest["cases"]} == {"head_rms_norm"}


def test_json_stays_json(capsys, bundle):
    code, out, _ = run(capsys, "parity", "-k", "rms_norm/", "--record", bundle, "--json")
    assert code == 0
    assert json.loads(out)["totals"]["failed"] == 0
    assert bundle.exists()


@pytest.mark.parametrize("mutation", ["--faults", "--mutants"])
@pytest.mark.parametrize("option", ["--record", "--replay"])
def test_faults_are_refused_beside_a_bundle(capsys, bundle, option, mutation):
    code, out, err = run(capsys, "parity", "-k", "rms_norm/", option, bundle, mutation)
    assert (code, out) == (2, "")
    assert option in err
    assert not bundle.exists()


@pytest.mark.parametrize(
    "options", [("--record", "b", "--replay", "b"), ("--replay", "b", "--device", "npu")]
)
def test_options_that_contradict_each_other(capsys, options):
    code, out, err = run(capsys, "parity", *options)
    assert (code, out) == (2, "")
    assert options[0] in err


@pytest.mark.parametrize("where", [".", "no/such/folder/b", "/dev/null", "pipe"])
def test_only_a_file_in_a_folder_is_written(capsys, tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    code, out, err = run(capsys, "parity", "-k", "rms_norm/", "--record", where)
    assert (code, out) == (2, "")
    assert "--record: found" in err
    assert len(err.splitlines()) == 1
    assert sorted(os.listdir()) == ["pipe"]
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_wrong_pattern_writes_nothing(capsys, bundle):
    code, *_ = run(capsys, "parity", "-k", "rms_norm/no such case", "--record", bundle)
    assert code == 2
    assert not bundle.exists()


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_disk_that_refuses_leaves_the_old_file(capsys, bundle, monkeypatch, call):
    bundle.write_bytes(b"old")

    def refuse(*arguments, **options):
        raise OSError(28, "No space left on device")

    if call == "write":
        monkeypatch.setattr("dsv4_ascend.checkpoint.safetensors_stream.data_of", refuse)
    elif call == "fsync":
        monkeypatch.setattr(os, "fsync", refuse)
    else:
        monkeypatch.setattr(type(bundle), "replace", refuse)
    code, out, err = run(capsys, "parity", "-k", "rms_norm/", "--record", bundle)
    assert (code, out) == (3, "")
    assert "No space left on device" in err
    assert str(bundle) in err
    assert len(err.splitlines()) == 1
    assert bundle.read_bytes() == b"old"
    assert os.listdir(bundle.parent) == [bundle.name]


def test_an_old_file_is_replaced(capsys, bundle):
    bundle.write_bytes(b"old")
    assert run(capsys, "parity", "-k", "rms_norm/", "--record", bundle)[0] == 0
    assert loaded(bundle)[1]["complete"]
    assert os.listdir(bundle.parent) == [bundle.name]


class TestStream:
    def test_every_tensor_is_aligned(self, bundle):
        tensors = {
            "bytes": torch.arange(3, dtype=torch.uint8),
            "wide": torch.arange(5, dtype=torch.float64),
            "nothing": torch.empty(0, 4),
            "codes": torch.arange(7, dtype=torch.uint8).view(torch.float8_e4m3fn),
            "halves": torch.arange(3, dtype=torch.bfloat16),
            "number": torch.tensor(3, dtype=torch.int32),
            "strided": torch.arange(12).view(3, 4).t(),
        }
        with SafetensorsStream(bundle) as stream:
            for name, tensor in tensors.items():
                assert stream.add(name, tensor) == name
            stream.finish({"parity": "x"})
        raw = bundle.read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        start = len(raw) - max(e["data_offsets"][1] for n, e in header.items() if n in tensors)
        for name, tensor in tensors.items():
            assert (start + header[name]["data_offsets"][0]) % tensor.element_size() == 0

    def test_an_interrupted_tensor_leaves_no_hole(self, bundle, monkeypatch):
        with SafetensorsStream(bundle) as stream:
            stream.add("first", torch.ones(3))
            with monkeypatch.context() as patch:
                patch.setitem(stream._parts, 4, Interrupted(stream._parts[4]))
                with pytest.raises(KeyboardInterrupt):
                    stream.add("second", torch.ones(9))
            stream.add("third", 3 * torch.ones(2))
            stream.finish({"dsv4_ascend_parity": "{}"})
        tensors, _ = loaded(bundle)
        assert set(tensors) == {"first", "third"}
        assert tensors["third"].tolist() == [3, 3]

    def test_without_finish_nothing_is_there(self, bundle):
        with SafetensorsStream(bundle) as stream:
            stream.add("first", torch.ones(3))
        assert not os.listdir(bundle.parent)


class Interrupted:
    """A file that Ctrl-C meets in the middle of a write."""

    def __init__(self, file):
        self.file, self.seek = file, file.seek

    def write(self, data):
        self.file.write(data[:5])
        raise KeyboardInterrupt
