"""Which implementation runs, what strict mode says, and what torch sees of every operator."""

import contextlib
import subprocess
import sys
import threading

import pytest
import torch
from seeds import seed_of

from dsv4_ascend.parity.compare import compare
from dsv4_ascend.parity.runner import map_tensors, mutated_arguments, samples
from dsv4_backend import OPERATORS, dispatch
from dsv4_backend.errors import Dsv4Error, UnsupportedError
from dsv4_backend.ops.norm import rms_norm

FLOATS = (torch.float32, torch.bfloat16)
NATIVE = {name for name, device in dispatch.native_kernels() if device == "cpu"}

every_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
X = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed_of(__name__)))
WEIGHT = torch.ones(64)


def tensors_of(result):
    return (
        () if result is None else (result,) if isinstance(result, torch.Tensor) else tuple(result)
    )


def ordinary_case(operator):
    """The first case with something in every tensor, in the official profile where there is one."""
    cases = [
        c
        for c in operator.iterate_cases()
        if all(t.numel() for t in c.arguments if isinstance(t, torch.Tensor))
    ]
    return next((c for c in cases if c.profile == "official"), cases[0])


def copies(arguments):
    return [map_tensors(torch.clone, a) for a in arguments]


def assert_same(got, want):
    for g, w in zip(tensors_of(got), tensors_of(want), strict=True):
        assert compare(g, w, (0, 0)).ok, compare(g, w, (0, 0)).detail


@pytest.fixture
def reference_calls(monkeypatch):
    calls = []
    original = rms_norm.reference

    def counted(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(rms_norm, "reference", counted)
    return calls


def test_auto_prefers_the_native_kernel(reference_calls):
    rms_norm(X, WEIGHT, 1e-6)
    assert not reference_calls


def test_auto_falls_back_to_the_reference(reference_calls):
    rms_norm(X.double(), WEIGHT, 1e-6)
    assert len(reference_calls) == 1


def test_reference_policy_forces_the_reference(reference_calls):
    with dispatch.use("reference"):
        rms_norm(X, WEIGHT, 1e-6)
    assert len(reference_calls) == 1


def test_strict_runs_native_kernels(reference_calls):
    with dispatch.use("strict"):
        rms_norm(X, WEIGHT, 1e-6)
    assert not reference_calls


def test_strict_names_operator_device_condition_and_way_out():
    with dispatch.use("strict"), pytest.raises(UnsupportedError) as caught:
        rms_norm(X.double(), WEIGHT, 1e-6)
    assert str(caught.value) == (
        "dsv4::rms_norm has no native implementation for these arguments on cpu: "
        "x is float64, which only the reference computes. "
        'Use dispatch.use("auto") to run the reference on the same device.'
    )
    assert isinstance(caught.value, Dsv4Error)
    assert isinstance(caught.value, NotImplementedError)


@every_operator
def test_support_says_what_strict_does(operator):
    for case in operator.iterate_cases():
        answer = dispatch.support(operator.name, *copies(case.arguments))
        with (
            dispatch.use("strict"),
            contextlib.nullcontext() if answer else pytest.raises(UnsupportedError) as caught,
        ):
            operator(*copies(case.arguments))
        assert answer or answer.reason in str(caught.value)


def test_policy_is_restored_after_an_error():
    with pytest.raises(UnsupportedError), dispatch.use("strict"):
        rms_norm(X.double(), WEIGHT, 1e-6)
    rms_norm(X.double(), WEIGHT, 1e-6)


def test_policies_nest():
    with dispatch.use("strict"):
        with dispatch.use("reference"):
            rms_norm(X.double(), WEIGHT, 1e-6)
        with pytest.raises(UnsupportedError):
            rms_norm(X.double(), WEIGHT, 1e-6)


def test_policy_belongs_to_a_thread():
    results = []
    with dispatch.use("strict"):
        thread = threading.Thread(target=lambda: results.append(rms_norm(X.double(), WEIGHT, 1e-6)))
        thread.start()
        thread.join()
    assert len(results) == 1


def test_unknown_policy_is_named():
    with (
        pytest.raises(ValueError, match=r"'fast' is not one of auto, reference, strict"),
        dispatch.use("fast"),
    ):
        pass


def test_support_asks_for_the_device_of_the_tensors():
    x, weight = torch.ones(2, 8), torch.ones(8)
    assert dispatch.support("rms_norm", x, weight, 1e-6)
    elsewhere = x.to("meta"), weight.to("meta"), 1e-6  # stands for npu: no kernel there either
    assert not dispatch.support("rms_norm", *elsewhere)
    assert not dispatch.support("rms_norm", x=elsewhere[0], weight=elsewhere[1], eps=1e-6)
    assert dispatch.support(
        "rms_norm", x, weight, 1e-6, device="npu"
    ).reason  # with torch_npu or without


def test_unknown_operator_is_named():
    with pytest.raises(KeyError, match="dsv4::softmax"):
        dispatch.support("softmax", X)


@every_operator
def test_gradient_is_the_references(operator):
    for profile in ("ideal", "official"):
        for sample in list(samples(operator, profile))[:6]:
            assert_same(
                gradients(operator, operator, sample.case),
                gradients(operator, operator.reference, sample.case),
            )


def test_tangents_are_the_references():
    """Forward mode, out of place and in place."""
    x, v, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    got, want = (
        torch.func.jvp(lambda a, f=f: f(a, weight, 1e-6), (x,), (v,))
        for f in (rms_norm, rms_norm.reference)
    )
    assert_same(got, want)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, v)
        tangent = torch.autograd.forward_ad.unpack_dual(rms_norm(dual, weight, 1e-6)).tangent
    assert_same((tangent,), want[1:])


def test_operators_without_gradient():
    """Codes and what takes nothing else, bytes, choices and ids have none;
    every other operator has.
    """
    without = {op.name for op in OPERATORS.values() if not any(map(len, case_gradients(op)))}
    coded = {
        name
        for name in OPERATORS
        if name.startswith(("read_cache_", "write_cache_", "int8_", "mx", "pack_"))
    }
    # These have one by their scales.
    coded = (coded | {"fp8_token_quant"}) - {"int8_gemm", "int8_grouped_gemm"}
    coded -= {"int8_moe", "mx_moe"}
    coded |= {name for name in OPERATORS if name.startswith(("rms_norm_", "indexer_prolog"))}
    chosen = {name for name in OPERATORS if name.startswith("lightning_indexer")}
    others = {"act_quant", "fp4_quant", "swiglu_quant", "topk_indices", "indexer_topk", "sample"}
    assert without == coded | chosen | others


def case_gradients(operator):
    return (gradients(operator, operator.reference, sample.case) for sample in samples(operator))


def gradients(operator, function, case):
    written = mutated_arguments(operator)
    arguments = [
        map_tensors(torch.clone, a) if i in written else map_tensors(leaf, a)
        for i, a in enumerate(case.arguments)
    ]
    outputs = tensors_of(function(*arguments)) + tuple(arguments[i] for i in written)
    total = sum((wave(t) * t).sum() for t in outputs if t.requires_grad)
    if isinstance(total, int):
        return ()
    kept = [a for i, a in enumerate(arguments) if i not in written]
    leaves = [t for t in kept if isinstance(t, torch.Tensor) and t.requires_grad]
    return tuple(
        g if g is not None else torch.zeros(())
        for g in torch.autograd.grad(total, leaves, allow_unused=True)
    )


def leaf(tensor):
    return tensor.detach().clone().requires_grad_(tensor.dtype in FLOATS)


def wave(tensor):
    """A cotangent that differs from element to element."""
    return torch.arange(tensor.numel()).cos().view(tensor.shape).to(tensor.dtype)


@pytest.mark.parametrize("policy", ["auto", "reference"])
@pytest.mark.parametrize("name", [op.name for op in OPERATORS.values() if mutated_arguments(op)])
def test_version_of_written_arguments_rises(name, policy):
    operator = OPERATORS[name]
    arguments = copies(ordinary_case(operator).arguments)
    before = [a._version if isinstance(a, torch.Tensor) else None for a in arguments]
    with dispatch.use(policy):
        operator(*arguments)
    written = mutated_arguments(operator)
    for i, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor):
            assert (argument._version > before[i]) == (i in written)


@every_operator
def test_compiles_without_a_graph_break(operator):
    case = ordinary_case(operator)
    eager, traced = copies(case.arguments), copies(case.arguments)
    compiled = torch.compile(lambda *args: operator(*args), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_same(compiled(*traced), operator(*eager))
    assert_same(
        [traced[i] for i in mutated_arguments(operator)],
        [eager[i] for i in mutated_arguments(operator)],
    )
    torch.compiler.reset()


@every_operator
def test_inference_mode(operator):
    arguments = copies(ordinary_case(operator).arguments)
    with torch.inference_mode():
        inside = operator(*copies(arguments))
    assert_same(inside, operator(*arguments))


@every_operator
def test_meta_device_gives_shapes(operator):
    case = ordinary_case(operator)
    real = tensors_of(operator(*copies(case.arguments)))
    meta = tensors_of(operator(*[map_tensors(lambda t: t.to("meta"), a) for a in case.arguments]))
    assert [(t.shape, t.dtype, t.stride()) for t in real] == [
        (t.shape, t.dtype, t.stride()) for t in meta
    ]


IMPORT_PROBE = """
import os, sys, threading, torch
state = lambda: (
    dict(os.environ), torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
    torch.random.get_rng_state().tolist(), threading.active_count(), os.getcwd(),
    sys.getrecursionlimit(),
)
seen, before, watching = [], state(), [True]
WATCHED = {
    "subprocess.Popen", "socket.connect", "os.putenv", "os.unsetenv", "os.mkdir", "os.system",
    "os.fork",
}
def writes(event, args):
    return event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
def hook(event, args):
    if watching and (event in WATCHED or writes(event, args)):
        seen.append((event, args))
sys.addaudithook(hook)
import dsv4_backend, dsv4_ascend
watching.clear()
assert not seen, seen
assert state() == before
assert not hasattr(torch, "npu") and not torch.cuda.is_initialized()
"""

ENVIRONMENT_PROBE = """
import os
before = dict(os.environ)
import dsv4_ascend
assert dict(os.environ) == before
"""


@pytest.mark.parametrize("probe", [IMPORT_PROBE, ENVIRONMENT_PROBE], ids=["process", "environment"])
def test_import_does_nothing(probe):
    done = subprocess.run(
        [sys.executable, "-B", "-c", probe], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_strict_refuses_to_differentiate_the_reference_in_silence():
    x = torch.ones(3, 4, requires_grad=True)
    with dispatch.use("strict"):
        with pytest.raises(UnsupportedError, match="gradient"):
            torch.ops.dsv4.rms_norm(x, torch.ones(4), 1e-6)
        torch.ops.dsv4.rms_norm(x.detach(), torch.ones(4), 1e-6)


def test_a_device_that_nobody_serves_runs_the_reference():
    """In a process of its own: the lazy backend starts once, and the announcement comes once."""
    program = (
        "import torch, torch._lazy, torch._lazy.ts_backend\n"
        "from dsv4_backend.ops.norm import rms_norm\n"
        "torch._lazy.ts_backend.init(); x = torch.randn(3, 8)\n"
        "y = rms_norm(x.to('lazy'), torch.ones(8).to('lazy'), 1e-6).cpu()\n"
        "print(torch.allclose(y, rms_norm(x, torch.ones(8), 1e-6)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout == "True\n", done.stderr
    assert "runs as its PyTorch reference on lazy" in done.stderr
