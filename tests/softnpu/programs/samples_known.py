"""Where torch_npu differs from the CPU by itself,
or softnpu does not emulate it: a row fails the test when it is no longer met.
"""

from dataclasses import dataclass

ALL = "float32 bfloat16 int64 bool"
FLOATS = "float32 bfloat16"


@dataclass(frozen=True)
class Known:
    names: str
    text: str
    """What the problem says."""
    reason: str
    dtypes: str = ALL
    chips: str = "A2, A3, A5"


KNOWN = [
    Known("stft", "aclStft", "softnpu: not emulated", "float32"),
    Known(
        "stft",
        "not differentiable with respect to argument 'window'",
        "torch_npu: no gradient of the window",
        "float32",
    ),
    Known(
        "bfloat16 bool byte char double float half int long short cfloat cdouble chalf to",
        "Only contiguous_format or preserve_format",
        "torch_npu: no channels_last",
    ),
    Known(
        "double float_power",
        "dtype torch.float32, expected torch.float64",
        "torch_npu: float64 becomes float32",
    ),
    Known(
        "logit",
        "expected torch.float32",
        "torch_npu: the result has the type of x",
        "int64 bool",
    ),
    Known("tensor_split", "to be on cpu", "torch wants these indices on the CPU"),
    Known(
        "matmul __rmatmul__",
        "cannot reshape tensor of 0 elements",
        "torch_npu: gradient of an empty product",
        FLOATS,
    ),
    Known(
        "native_batch_norm _native_batch_norm_legit",
        "expected (0,)",
        "torch_npu: statistics when not training",
        FLOATS,
    ),
    Known(
        "native_batch_norm _native_batch_norm_legit native_layer_norm",
        "dtype torch.float32",
        "torch_npu: fp32 statistics",
        "bfloat16",
    ),
    Known(
        "nn.functional.binary_cross_entropy_with_logits",
        "gradient: 1 results",
        "torch_npu: no gradient of the target",
        FLOATS,
    ),
    Known(
        "nn.functional.max_pool1d nn.functional.max_pool2d",
        "64), expected",
        "torch_npu: a mask for indices",
        FLOATS,
        "A2, A3",
    ),
    Known(
        "nn.functional.max_pool2d",
        "64), expected",
        "torch_npu: a mask for indices",
        "int64",
        "A2, A3",
    ),
    Known(
        "nn.functional.max_pool1d nn.functional.max_pool2d",
        "dtype torch.int32",
        "torch_npu: int32 indices",
        FLOATS,
        "A5",
    ),
    Known(
        "nn.functional.max_pool2d", "dtype torch.int32", "torch_npu: int32 indices", "int64", "A5"
    ),
    Known(
        "nn.functional.max_pool3d",
        "dtype torch.int32",
        "torch_npu: int32 indices",
        FLOATS + " int64",
    ),
    Known(
        "nn.functional.max_unpool2d/grad",
        "only supported contiguous memory format",
        "torch_npu: no channels_last",
        "bfloat16",
    ),
    Known("nn.functional.gelu", "values", "torch_npu: drops approximate", "float32", "A2, A3"),
    Known(
        "native_dropout_backward",
        "values",
        "torch_npu: the mask has one bit for each value",
        FLOATS,
    ),
    Known("native_dropout_backward", "dtype", "torch_npu: the gradient's dtype", "int64 bool"),
]


def rows(name, dtype, chip):
    return [
        k
        for k in KNOWN
        if name in k.names.split() and dtype in k.dtypes.split() and chip in k.chips
    ]
