"""The RMSNorm kernel: every instruction set that this machine runs, against the contract."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_ascend.parity.runner import samples
from dsv4_backend import _C, OPERATORS, dispatch
from dsv4_backend.errors import ArgumentError, UnsupportedError

CSRC = Path(__file__).parents[2] / "csrc"
RMS_NORM = OPERATORS["rms_norm"]
RELATIVE = {torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
DTYPES = tuple(RELATIVE)
ARGUMENTS = (torch.ones(3, 64), torch.ones(64), 1e-6)
WIDTHS = (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 130)


def reference(x, weight, eps=1e-6):
    with dispatch.use("reference"):
        return RMS_NORM(x, weight, eps)


def assert_near(got, want):
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=RELATIVE[want.dtype], atol=1e-7, equal_nan=True)


def test_best_isa_is_the_default():
    assert _C.isa() == _C.available_isas()[0]
    assert _C.available_isas()[-1] == "portable"


def test_unknown_isa_is_refused():
    with pytest.raises(ValueError, match=r"'sse9' is not one that this machine runs: .*portable"):
        _C.set_isa("sse9")


@pytest.mark.parametrize("sample", list(samples(RMS_NORM)), ids=lambda sample: sample.name)
def test_contract_cases(isa, sample):
    result = sample.run(RMS_NORM)
    assert result.ok, result.detail


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_every_dtype_pair_and_tail_length(isa, dtype, weight_dtype):
    for width in WIDTHS:
        x, weight = torch.randn(3, width, dtype=dtype), torch.randn(width, dtype=weight_dtype)
        assert_near(RMS_NORM(x, weight, 1e-6), reference(x, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_is_read_exactly(isa, dtype):
    weight = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    # 1 / sqrt(mean(1)) is 1: the weight comes through.
    got = RMS_NORM(torch.ones(len(weight)), weight, 0.0)
    assert torch.equal(got.nan_to_num(nan=7e4), weight.float().nan_to_num(nan=7e4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_16_bits_is_to_nearest_even(isa, dtype):
    values = torch.arange(2**15).to(torch.int16).view(dtype).float()
    values = values[values.isfinite()]
    midpoints = (values[1:] + values[:-1]) / 2
    beyond = torch.tensor(
        [65519.0, 65520.0, 1e38, torch.finfo().max, torch.inf, 2.0**-25, 2.0**-149]
    )
    inward, outward = (
        midpoints.nextafter(torch.tensor(0.0)),
        midpoints.nextafter(torch.tensor(torch.inf)),
    )
    weight = torch.cat([values, midpoints, inward, outward, beyond])
    weight = torch.cat([weight, -weight])
    for part in weight.split(4096):
        assert torch.equal(RMS_NORM(torch.ones(len(part), dtype=dtype), part, 0.0), part.to(dtype))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4), (0,)])
def test_nothing_gives_nothing(isa, shape):
    got = RMS_NORM(torch.empty(shape), torch.ones(shape[-1]), 1e-6)
    assert got.shape == shape
    assert got.is_contiguous()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_special_values_stay_in_their_row(isa, bad):
    x, weight = torch.randn(37, 37), torch.randn(37)
    clean = RMS_NORM(x, weight, 1e-6)
    for i in range(1, 37, 5):  # also the vectors' ends and the tail
        spoiled = x.clone()
        spoiled[i, i] = bad
        got = RMS_NORM(spoiled, weight, 1e-6)
        torch.testing.assert_close(got[i], reference(spoiled, weight)[i], equal_nan=True)
        others = torch.arange(37) != i
        assert torch.equal(got[others], clean[others])


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_strides(data):
    sizes = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    strides = [data.draw(st.integers(0, 40)) for _ in sizes[1:]] + [1]
    needed = 1 + sum(max(n - 1, 0) * s for n, s in zip(sizes, strides, strict=True))
    offset = data.draw(st.integers(0, 3))
    x = torch.randn(needed + offset).as_strided(sizes, strides, offset)
    weight = torch.randn(2 * sizes[-1] + 1)[1 : sizes[-1] + 1]
    with dispatch.use("strict"):
        got = RMS_NORM(x, weight, 1e-6)
    assert_near(got, reference(x, weight))
    assert got.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_itself_alone(isa, dtype):
    x, weight = torch.randn(65, 4096, dtype=dtype), torch.randn(4096)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(RMS_NORM(x, weight, 1e-6))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)
    assert torch.equal(results[0], torch.cat([RMS_NORM(row, weight, 1e-6) for row in x.split(1)]))


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.ones(3, 4), torch.ones(5), 1e-6),
        (torch.ones(3, 4), torch.ones(1, 4), 1e-6),
        (torch.ones(3, 4), torch.tensor(1.0), 1e-6),
        (torch.tensor(1.0), torch.ones(1), 1e-6),
        (torch.ones(3, 4, dtype=torch.int32), torch.ones(4), 1e-6),
        (torch.ones(3, 4), torch.ones(4, dtype=torch.uint8), 1e-6),
        (torch.ones(3, 4, dtype=torch.float8_e4m3fn), torch.ones(4), 1e-6),
        (torch.ones(3, 4), torch.ones(4, device="meta"), 1e-6),
        (torch.ones(3, 4), torch.ones(4), float("nan")),
        (torch.ones(0, 4), torch.ones(3), 1e-6),
    ],
    ids=str,
)
def test_wrong_arguments_get_the_same_words_from_every_implementation(arguments):
    with dispatch.use("strict"), pytest.raises(ArgumentError) as native:
        RMS_NORM(*arguments)
    with dispatch.use("reference"), pytest.raises(ArgumentError) as contract:
        RMS_NORM(*arguments)
    assert str(native.value) == str(contract.value)


@pytest.mark.parametrize(
    ("x", "weight", "reason"),
    [
        (torch.ones(3, 4, dtype=torch.float64), torch.ones(4), "x is float64"),
        (torch.ones(3, 4), torch.ones(4, dtype=torch.float64), "weight is float64"),
        (torch.ones(4, 3).t(), torch.ones(4), "x's last dimension is not contiguous"),
        (torch.ones(3, 4), torch.ones(8)[::2], "weight's last dimension is not contiguous"),
        (torch.ones(3, 4).to_sparse(), torch.ones(4), "x is not a strided tensor"),
    ],
    ids=["fp64 x", "fp64 weight", "strided row", "strided weight", "sparse"],
)
def test_what_the_kernel_leaves_to_the_reference(x, weight, reason):
    answer = dispatch.support("rms_norm", x, weight, 1e-6)
    assert not answer
    assert reason in answer.reason


def sources_without_torch(*command):
    sources = [CSRC / "common" / "isa.cpp", *(CSRC / "cpu").glob("*.cpp")]
    options = ["-std=c++20", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
    done = subprocess.run([*command, *options, *sources], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_kernels_include_no_torch():
    """Every include is found without torch's folders; the build has compiled what they hold."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    sources_without_torch("g++", "-M")


@pytest.mark.long
@pytest.mark.parametrize("compiler", ["g++", "clang++", "aarch64-linux-gnu-g++"])
def test_kernels_compile_without_torch(compiler):
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    command = [compiler, "-dumpmachine"]
    machine = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    oldest = ["-march=x86-64"] if machine.startswith("x86_64") else []
    sources_without_torch(compiler, "-fsyntax-only", *oldest)


def test_special_instructions_stay_in_their_functions():
    """What the linker may share between files must run on every machine."""
    if "avx2" not in _C.available_isas() or shutil.which("nm") is None:
        pytest.skip("needs an x86-64 machine and nm")
    built = {path.stem: path for path in CSRC.parent.glob("build/*/csrc/cpu/*.o")}
    sources = [path for path in (CSRC / "cpu").glob("*.cpp") if "foreach_isa.h" in path.read_text()]
    for source in sources:
        command = ["nm", "-C", built[source.stem]]
        symbols = subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        assert any("::avx512::" in line for line in symbols)
        shared = [line for line in symbols if line[17:18] in "TWVu" and "cpu::avx" in line]
        assert not shared, shared


def test_a_candidate_of_another_isa_says_so(isa):
    answers = {c.name: c.reason for c in dispatch.candidates("rms_norm", *ARGUMENTS)}
    order = ["rms_norm/avx512", "rms_norm/avx2", "rms_norm/portable"]
    assert list(answers) == order
    first = order.index(f"rms_norm/{isa}")
    assert all(f"this process uses {isa}" in answers[name] for name in order[:first])
    assert all(answers[name] is None for name in order[first:])


def test_what_ran_is_counted(isa):
    dispatch.forget_ran()
    RMS_NORM(*ARGUMENTS)
    with dispatch.use("reference"):
        RMS_NORM(*ARGUMENTS)
        RMS_NORM(*ARGUMENTS)
    assert dispatch.ran()["rms_norm", "cpu"] == {f"rms_norm/{isa}": 1, "reference": 2}
    dispatch.forget_ran()
    assert dispatch.ran() == {}


def test_one_candidate_can_be_forced():
    with dispatch.use("strict", only="rms_norm/portable"):
        dispatch.forget_ran()
        RMS_NORM(*ARGUMENTS)
        assert dispatch.ran()["rms_norm", "cpu"] == {"rms_norm/portable": 1}
    with (
        dispatch.use("strict", only="rms_norm/amx"),
        pytest.raises(UnsupportedError, match="rms_norm/amx"),
    ):
        RMS_NORM(*ARGUMENTS)


def test_another_machine_can_be_asked_about():
    portable = dispatch.Context(isa="portable")
    assert dispatch.support("rms_norm", *ARGUMENTS, context=portable).reason == "rms_norm/portable"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="avx candidates are built for x86 only")
@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_a_machine_with_another_instruction_set_can_be_asked_about(isa):
    """Whatever this one runs: answers do not depend on it."""
    answers = dispatch.candidates("rms_norm", *ARGUMENTS, context=dispatch.Context(isa=isa))
    refusals = [f"needs {better}, and this process uses {isa}" for better in ("avx512", "avx2")]
    reasons = [answer.reason for answer in answers if answer.reason]
    assert reasons == refusals[: len(reasons)]
    assert next(answer.name for answer in answers if answer.reason is None) == f"rms_norm/{isa}"


@pytest.mark.parametrize("isa", ["neon", "AVX512", ""])
def test_an_unknown_instruction_set_is_named(isa):
    with pytest.raises(ValueError, match=f"ISA '{isa}' is not portable, avx2 or avx512"):
        dispatch.candidates("rms_norm", *ARGUMENTS, context=dispatch.Context(isa=isa))


def with_variable(value, *command):
    environment = os.environ | {"DSV4_ISA": value}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("isa", [*_C.available_isas(), ""])
def test_the_environment_chooses_the_instruction_set(isa):
    done = with_variable(isa, "-c", "from dsv4_backend import _C; print(_C.isa())")
    assert done.stdout.strip() == (isa or _C.available_isas()[0]), done.stderr


def test_an_instruction_set_that_the_environment_makes_up_is_named():
    command = "sys.argv = ['dsv4-ascend', 'ops']; from dsv4_ascend.cli.main import main; main()"
    done = with_variable("neon", "-c", f"import sys; {command}")
    assert done.returncode == 3
    (line,) = done.stderr.strip().splitlines()
    known = ", ".join(_C.available_isas())
    said = f"DSV4_ISA in the environment: ISA 'neon' is not one that this machine runs: {known}"
    assert said in line
    assert "reinstall" not in line
