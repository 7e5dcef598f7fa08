"""Calls any aclnn function of the software device by the names of its arguments, also those that
torch_npu has no Python name for.

`call("aclnnRmsNorm", x=x, gamma=gamma, epsilon=1e-6, y=y, rstd=rstd)`; outputs are arguments too.
"""

import ctypes
import os
from dataclasses import dataclass

import torch

ACL = ctypes.CDLL("libascendcl.so")
ACL.aclGetRecentErrMsg.restype = ctypes.c_char_p

TYPES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.int8: 2,
    torch.int32: 3,
    torch.uint8: 4,
    torch.int16: 6,
    torch.uint16: 7,
    torch.uint32: 8,
    torch.int64: 9,
    torch.uint64: 10,
    torch.float64: 11,
    torch.bool: 12,
    torch.bfloat16: 27,
    torch.float8_e5m2: 35,
    torch.float8_e4m3fn: 36,
    torch.float8_e8m0fnu: 37,
    torch.float4_e2m1fn_x2: 40,
}
FOUR_BITS = (29, 40)  # aclDataType: INT4, FLOAT4_E2M1
ND = 2  # aclFormat


class AclnnError(RuntimeError):
    """A refusal by phase 1 or 2: its code, and what CANN says of it."""

    def __init__(self, symbol, phase, code):
        text = (ACL.aclGetRecentErrMsg() or b"").decode()
        super().__init__(f"{symbol}, phase {phase}: error code is {code}: {text}")
        self.code = code


@dataclass
class Typed:
    """A tensor that is sent under another aclDataType of its element size, or as 4-bit values;
    `storage`: its storage dims where they are not one number of elements.
    """

    tensor: torch.Tensor
    dtype: int
    format: int = ND
    storage: tuple[int, ...] | None = None


def typed(tensor, dtype, **more):
    """`typed(bytes, 40)`: a uint8 tensor as FLOAT4_E2M1, twice as wide."""
    return Typed(tensor, dtype, **more)


def _integers(values):
    values = [int(v) for v in values]
    return (ctypes.c_int64 * max(len(values), 1))(*values), len(values)


class _Handles:
    """The objects of one call; `free` destroys them, after phase 2."""

    def __init__(self):
        self.made, self.kept = [], []

    def create(self, destroy, function, *arguments):
        create = getattr(ACL, function)
        create.restype = ctypes.c_void_p
        handle = ctypes.c_void_p(create(*arguments))
        if destroy:
            self.made.append((destroy, handle))
        return handle

    def tensor(self, value, destroy="aclDestroyTensor"):
        if value is None:
            return ctypes.c_void_p()
        if not isinstance(value, Typed):
            value = Typed(value, TYPES[value.dtype])
        x = value.tensor
        if x.device.type != "npu":
            raise TypeError(f"a tensor on {x.device}: aclnn functions want one on npu")
        sizes, strides, offset = list(x.size()), list(x.stride()), x.storage_offset()
        storage = x.untyped_storage()
        held = [storage.nbytes() // x.element_size()]
        if value.dtype in FOUR_BITS:
            packed = max(i for i, stride in enumerate(strides) if stride == 1)
            sizes[packed] *= 2
            strides = [s if i == packed else 2 * s for i, s in enumerate(strides)]
            offset, held = 2 * offset, [2 * held[0]]
        c_sizes, rank = _integers(sizes)
        c_held, held_rank = _integers(value.storage or held)
        return self.create(
            destroy, "aclCreateTensor", c_sizes, ctypes.c_uint64(rank), value.dtype,
            _integers(strides)[0], ctypes.c_int64(offset), value.format, c_held,
            ctypes.c_uint64(held_rank), ctypes.c_void_p(storage.data_ptr()),
        )  # fmt: skip

    def tensors(self, values):
        if values is None:
            return ctypes.c_void_p()
        handles = [self.tensor(v, destroy=None) for v in values]  # the list destroys its members
        array = (ctypes.c_void_p * max(len(handles), 1))(*(h.value for h in handles))
        return self.create(
            "aclDestroyTensorList", "aclCreateTensorList", array, ctypes.c_uint64(len(handles))
        )

    def array(self, kind, values):
        if values is None:
            return ctypes.c_void_p()
        c_type = {"Int": ctypes.c_int64, "Bool": ctypes.c_bool, "Float": ctypes.c_float}[kind]
        array = (c_type * max(len(values), 1))(*values)
        return self.create(
            f"aclDestroy{kind}Array", f"aclCreate{kind}Array", array, ctypes.c_uint64(len(values))
        )

    def text(self, value):
        if value is None:
            return ctypes.c_char_p()
        self.kept.append(ctypes.create_string_buffer(value.encode()))
        return ctypes.cast(self.kept[-1], ctypes.c_char_p)

    def free(self):
        for destroy, handle in reversed(self.made):
            getattr(ACL, destroy)(handle)


CONVERSIONS = {
    "aclTensor*": _Handles.tensor,
    "aclTensorList*": _Handles.tensors,
    "aclIntArray*": lambda handles, v: handles.array("Int", v),
    "aclBoolArray*": lambda handles, v: handles.array("Bool", v),
    "aclFloatArray*": lambda handles, v: handles.array("Float", v),
    "char*": _Handles.text,
    "aclDataType": lambda _, v: ctypes.c_int(TYPES.get(v, v)),
    "bool": lambda _, v: ctypes.c_bool(v),
    "int": lambda _, v: ctypes.c_int(v),
    "int8_t": lambda _, v: ctypes.c_int8(v),
    "int32_t": lambda _, v: ctypes.c_int32(v),
    "int64_t": lambda _, v: ctypes.c_int64(v),
    "uint64_t": lambda _, v: ctypes.c_uint64(v),
    "float": lambda _, v: ctypes.c_float(v),
    "double": lambda _, v: ctypes.c_double(v),
}
TENSORS = ("aclTensor*", "aclTensorList*", "aclIntArray*", "aclBoolArray*", "aclFloatArray*")


def _ordered(symbol, expected, positional, named):
    """The values in C order; a pointer that is not given is null, a number must be given."""
    if positional and len(positional) != len(expected):
        raise TypeError(f"{symbol} has {len(expected)} arguments, found {len(positional)}")
    unknown = named.keys() - {name for _, name in expected}
    if unknown:
        raise TypeError(f"{symbol} has no {sorted(unknown)}, but {[n for _, n in expected]}")
    if positional:
        values = positional
    else:
        missing = [n for t, n in expected if t not in TENSORS and n not in named]
        if missing:
            raise TypeError(f"{symbol} also wants {missing}")
        values = [named.get(name) for _, name in expected]
    return [(c_type, value) for (c_type, _), value in zip(expected, values, strict=True)]


class Library:
    """The operators of one shared object, and of no other that it may need."""

    def __init__(self, file):
        self.functions = ctypes.CDLL(file)
        self.functions.softnpu_signature.restype = ctypes.c_char_p

    def signature(self, symbol):
        """The C arguments of phase 1, before workspaceSize and executor; None: it has no such."""
        signature = self.functions.softnpu_signature(symbol.encode())
        return signature and signature.decode()

    def parameters(self, symbol):
        """[(C type, name or "")] of the same."""
        signature = self.signature(symbol)
        if signature is None:
            raise AttributeError(f"softnpu has no {symbol} in {self.functions._name}")
        result = []
        for argument in signature.split(", "):
            words = argument.removeprefix("const ").split()
            result.append((words[0], words[1] if len(words) > 1 else ""))
        return result

    def call(self, symbol, /, *positional, **named):
        """Runs both phases on the current stream, behind all that torch_npu has queued; AclnnError
        when one refuses. What the kernel finds is an error of the next `torch.npu.synchronize()`.
        """
        self.send(symbol, _ordered(symbol, self.parameters(symbol), positional, named))

    def send(self, symbol, arguments):
        """The same with [(C type, value)] as they are, right or wrong."""
        torch.npu.synchronize()
        handles = _Handles()
        size, executor = ctypes.c_uint64(), ctypes.c_void_p()
        try:
            converted = [CONVERSIONS[c_type](handles, value) for c_type, value in arguments]
            phase1 = getattr(self.functions, f"{symbol}GetWorkspaceSize")
            code = phase1(*converted, ctypes.byref(size), ctypes.byref(executor))
            if code:
                raise AclnnError(symbol, 1, code)
            workspace = torch.empty(size.value, dtype=torch.uint8, device="npu")
            stream = ctypes.c_void_p(torch.npu.current_stream().npu_stream)
            torch.npu.synchronize()
            code = getattr(self.functions, symbol)(
                ctypes.c_void_p(workspace.data_ptr() or None), size, executor, stream
            )
            if code:
                raise AclnnError(symbol, 2, code)
        finally:
            handles.free()


BUILTIN = Library("libopapi.so")
call, parameters = BUILTIN.call, BUILTIN.parameters


def vendor():
    """The library of the first vendor of this process."""
    folder = os.environ["ASCEND_CUSTOM_OPP_PATH"].split(os.pathsep)[0]
    return Library(f"{folder}/op_api/lib/libcust_opapi.so")
