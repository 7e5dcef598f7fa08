"""Our launchers over softnpu: `launchers.py PART [OPERATOR...]`.
Prints what it saw; an assertion ends it otherwise.
"""

import ctypes
import os
import sys
from collections import Counter

import torch
from aclnn import BUILTIN, vendor
from seeds import seed

from dsv4_ascend.parity.runner import implementations, map_tensors, run_cases, samples
from dsv4_backend import OPERATORS, dispatch
from dsv4_backend.errors import LaunchError
from softnpu.device import Softnpu

LAUNCHED = sorted({op for op, device in dispatch.native_kernels() if device == "npu"})


def parity(*names):
    """Every case that a launcher takes, of these operators or of every one that has one."""
    wrong = []
    for name in names or LAUNCHED:
        cases = list(samples(OPERATORS[name]))
        taken = [case for case in cases if list(implementations(case, "npu")) != ["reference"]]
        launched = [r for r in run_cases(taken, "npu") if r.implementation != "reference"]
        wrong += [f"{r.name}: {r.comparison.detail}" for r in launched if not r.comparison.ok]
        print(f"{name}: {len(launched)} of {len(cases)} cases launched")
        for implementation, times in Counter(r.implementation for r in launched).items():
            print(f"{implementation}: {times} results")
    assert not wrong, "\n".join(wrong)


def types_alone(signature):
    return ", ".join(argument.rpartition(" ")[0] for argument in signature.split(", "))


def _agree(library, symbol, ours):
    """Whether the package's function has the arguments that ours is declared with."""
    theirs = library.signature(symbol)
    # Operators of softnpu whose arguments have no names declare their types alone.
    return theirs is not None and theirs in (ours, types_alone(ours))


def signatures():
    """The C arguments that our functions are declared with are those that the device declares, in
    each package that documents place them in; another package's of that name are told apart.
    """
    libraries = {"builtin": BUILTIN, "vllm-ascend": vendor()}
    functions = dispatch.npu_functions()
    for one in functions:
        packages = {place.partition(" ")[0] for place in one.documented.split("; ")}
        assert packages - {"recipes"}, one  # softnpu brings no library of theirs
        for package in packages - {"recipes"}:
            theirs = libraries[package].signature(one.symbol)
            assert _agree(libraries[package], one.symbol, one.signature), (one, theirs)
    (norm,) = (one for one in functions if one.symbol == "aclnnRmsNormDynamicQuant")
    assert norm.documented.startswith("builtin"), norm
    assert not _agree(libraries["vllm-ascend"], norm.symbol, norm.signature), norm
    print(f"{len(functions)} signatures agree")


COPY = "aclnnInplaceCopy"
"""Of layouts, and of the widths of indices."""


def _launches(device, function, arguments):
    """How often each function of the device's was launched by one call, copies aside."""
    function(*arguments)  # what is made once per process is made before
    torch.npu.synchronize()
    before = Counter(device.launches())
    function(*arguments)
    torch.npu.synchronize()
    return {s: n for s, n in (Counter(device.launches()) - before).items() if s != COPY}


def _most_launches(device, launcher):
    """Of one call of a candidate, over the cases that it takes; up to the first composite one."""
    most = {}
    for sample in samples(OPERATORS[launcher.operator]):
        function = implementations(sample, "npu").get(launcher.name)
        if function is None:
            continue
        arguments = [map_tensors(lambda t: t.npu(), a) for a in sample.case.arguments]
        most = max(most, _launches(device, function, arguments), key=lambda m: sum(m.values()))
        if sum(most.values()) > 1:
            break
    return most


def kinds():
    """A fused candidate launches one function, whatever the case; a composite one more."""
    device = Softnpu(ctypes.CDLL("libascendcl.so"))
    for launcher in dispatch.launchers():
        # Those of several functions of their own are composite by their declaration.
        if launcher.device == "npu" and len(launcher.symbols) == 1:
            most = _most_launches(device, launcher)
            if most:
                kind = "fused" if sum(most.values()) == 1 else "composite"
                assert launcher.kind == kind, (launcher, most)
                print(f"{launcher.name} is {kind}")


def _rows(tokens=33, channels=64):
    generator = torch.Generator().manual_seed(seed(f"{tokens} tokens"))
    return torch.randn(tokens, channels, generator=generator), torch.rand(
        channels, generator=generator
    ) + 0.5


def _norm(x, weight):
    with dispatch.use("strict"):
        return torch.ops.dsv4.rms_norm(x, weight, 1e-6)


def order():
    """Between torch_npu's own operators and on side streams,
    a launch sees what was asked for before it.
    """
    x, weight = _rows()
    on_chip, its_weight = x.npu(), weight.npu()
    wrong = 0
    for round_number in range(40):
        stream = torch.npu.Stream() if round_number % 2 else torch.npu.current_stream()
        torch.npu.synchronize()
        with torch.npu.stream(stream):
            got = _norm(on_chip * (round_number + 1), its_weight) + round_number
        stream.synchronize()
        want = torch.ops.dsv4.rms_norm(x * (round_number + 1), weight, 1e-6) + round_number
        wrong += not torch.allclose(got.cpu(), want, atol=1e-5)
    print(f"{wrong} of 40 rounds wrong")


def graph():
    """A captured launch replays on new contents of the same buffers."""
    x, weight = _rows()
    static, its_weight = x.npu(), weight.npu()
    _norm(static, its_weight)
    torch.npu.synchronize()
    captured = torch.npu.NPUGraph()
    with torch.npu.graph(captured):
        result = _norm(static, its_weight) * 2
    for factor in (1.0, 3.0, -2.0):
        static.copy_((x + factor).npu())
        captured.replay()
        torch.npu.synchronize()
        want = torch.ops.dsv4.rms_norm(x + factor, weight, 1e-6) * 2
        assert torch.allclose(result.cpu(), want, atol=1e-5), factor
    print("3 replays right")


def refused():
    """A refusal in phase 1 is an error here that names all that matters; the process goes on."""
    x, weight = _rows()
    x, weight = x.npu(), weight.npu()
    try:
        _norm(x, weight)
        raise AssertionError("nothing was raised")
    except LaunchError as error:
        words = (
            "dsv4::rms_norm",
            "aclnnRmsNorm",
            "builtin",
            torch.npu.get_device_name(),
            "CANN",
            "561002",
        )
        assert all(word in str(error) for word in words), error
    want = torch.ops.dsv4.rms_norm(x.cpu(), weight.cpu(), 1e-6)
    assert torch.allclose(_norm(x, weight).cpu(), want, atol=1e-5)
    print("refused, then right")


def failed():
    """A launch that fails without a task queue is an error of that call; the process goes on."""
    assert os.environ["TASK_QUEUE_ENABLE"] == "0"
    x, weight = _rows()
    x, weight = x.npu(), weight.npu()
    try:
        _norm(x, weight)
        torch.npu.synchronize()
        raise AssertionError("nothing was raised")
    except RuntimeError as error:
        assert "dsv4_rms_norm" in str(error), error
    want = torch.ops.dsv4.rms_norm(x.cpu(), weight.cpu(), 1e-6)
    assert torch.allclose(_norm(x, weight).cpu(), want, atol=1e-5)
    print("failed, then right")


def candidates():
    """What another chip would run, and why not, from the same predicates."""
    stream = torch.zeros(2, 4, 256, dtype=torch.bfloat16)
    call = "hc_post", stream[:, 0], stream, torch.zeros(2, 4), torch.zeros(2, 4, 4)
    for chip, cann, packages, word in (
        ("A5", "9.0.0", ("builtin",), None),
        ("A3", "9.1.0", ("builtin",), None),
        ("A3", "9.0.0", ("builtin",), "A2, A3 from CANN 9.1"),
        ("A2", "9.1.0", (), "aclnnMhcPost is not on A2"),
        ("Ascend310P3", "9.1.0", ("builtin",), "none of A2, A3, A5"),
        ("", "", (), "no Ascend chip"),
    ):
        context = dispatch.Context("portable", chip, cann, packages)
        (answer,) = dispatch.candidates(*call, device="npu", context=context)
        assert (answer.reason is None) if word is None else (word in answer.reason), (
            chip,
            cann,
            answer,
        )
    print("candidates answer for other machines")


if __name__ == "__main__":
    parts = (parity, signatures, kinds, order, graph, refused, failed, candidates)
    {f.__name__: f for f in parts}[sys.argv[1]](*sys.argv[2:])
