"""CANN's own operators and vllm-ascend's in one process: `packages.py PART`.
Prints what it saw; an assertion ends it otherwise.
"""

import sys
from pathlib import Path

import torch
from aclnn import BUILTIN, AclnnError, vendor
from dense_check import empty
from seeds import seed

import dsv4_ascend.tiny
from dsv4_backend import OPERATORS, dispatch

BOTH, ROUTED = "aclnnRmsNormDynamicQuant", "aclnnMoeGatingTopKHash"


def drawn(*shape):
    generator = torch.Generator().manual_seed(seed(f"packages {shape}"))
    return torch.randn(shape, generator=generator)


def chosen():
    """A launcher takes the function of the package whose arguments it has, and gets its values."""
    packages = {one.symbol: one.package for one in dispatch.npu_functions()}
    print(f"{BOTH}: {packages[BOTH]}; {ROUTED}: {packages[ROUTED] or 'nowhere'}")
    x, weight, bias = drawn(3, 256), drawn(64, 256), drawn(64)
    calls = {
        "rms_norm_int8": (x.bfloat16(), weight[0].bfloat16(), 1e-6),
        "gate_topk": (x, weight, bias, 6, 2.5),
        "gate_hash": (x, weight, torch.arange(3), torch.arange(60).view(10, 6), 2.5),
    }
    for name, arguments in calls.items():
        on_chip = [a.npu() if isinstance(a, torch.Tensor) else a for a in arguments]
        operator = OPERATORS[name]
        with dispatch.use("strict"):
            got = operator(*on_chip)
        for g, w in zip(got, operator.reference(*arguments), strict=True):
            assert torch.allclose(g.cpu().float(), w.float(), rtol=1e-4, atol=1e-6), (name, g, w)
        print(f"{name}: {', '.join(dispatch.ran()[name, 'npu'])}")


def generated():
    """Tokens of the shipped model in the profile of A2 and A3, on the CPU and here.

    By references on the CPU: where int8 codes tip, a kernel's rounding is another text.
    """
    checkpoint = Path(dsv4_ascend.tiny.__file__).parent / "checkpoint"
    for device, policy in (("cpu", "reference"), ("npu", "auto")):
        dispatch.forget_ran()
        model = dsv4_ascend.load(checkpoint, device=device, profile="a2a3-int8")
        with dispatch.use(policy):
            tokens = model.generate("The ", max_new_tokens=16, temperature=0)
        ran = {name for (op, _), of in dispatch.ran().items() for name in of if "gate_" in op}
        print(f"{device}: {tokens[0]} by {', '.join(sorted(ran))}")


def values(x):
    """What the functions of that name take, each argument by its name in either package."""
    results = dict(y=empty(*x.shape, dtype=torch.int8), scale=empty(len(x)))
    return dict(x=x, gamma=x[0].clone(), epsilon=1e-6, dst_type=2, **results)


def wrong():
    """The arguments of one package's function, sent to the other's of that name."""
    given = values(drawn(3, 64).bfloat16().npu())
    for name, library, other in (("vllm-ascend", vendor(), BUILTIN), ("CANN", BUILTIN, vendor())):
        assert library.signature(BOTH) != other.signature(BOTH)
        arguments = [(kind, given.get(n.rstrip("1"))) for kind, n in other.parameters(BOTH)]
        try:
            library.send(BOTH, arguments)
            raise SystemExit(f"{name} took the other's arguments")
        except AclnnError as error:
            print(f"{name}: {error}")


def lookup():
    """Which library torch_npu calls for aclnnMul, and which packages our launchers find."""
    two = torch.full((3,), 2.0).npu()
    print("product", (two * two).cpu().tolist()[0], "packages", dispatch.npu_packages())


if __name__ == "__main__":
    {f.__name__: f for f in (chosen, generated, wrong, lookup)}[sys.argv[1]]()
