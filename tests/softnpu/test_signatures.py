"""softnpu_signature: the C arguments of each operator as data,
for comparison with what a launcher sends.
"""

import json
import re

import pytest
from processes import HERE, run

SOURCES = HERE.parents[1] / "csrc" / "softnpu" / "opapi"
TENSOR, LIST, OUT, OUTS = "const aclTensor*", "const aclTensorList*", "aclTensor*", "aclTensorList*"

LAMBDAS = {
    "aclnnIndexSelect": (TENSOR, "int64_t", TENSOR, OUT),
    "aclnnMean": (TENSOR, "const aclIntArray*", "bool", "aclDataType", OUT),
    "aclnnIndex": (TENSOR, LIST, OUT),
    "aclnnInplaceUniform": (OUT, "double", "double", "uint64_t", "uint64_t"),
    "aclnnMv": (TENSOR, TENSOR, OUT, "int8_t"),
    "aclnnPdist": (TENSOR, "float", OUT),
}
STRUCTS = {
    "aclnnRmsNorm": f"{TENSOR} x, {TENSOR} gamma, double epsilon, {OUT} y, {OUT} rstd",
    "aclnnRotaryPositionEmbedding": (
        f"{TENSOR} x, {TENSOR} cos, {TENSOR} sin, int64_t mode, {OUT} out"
    ),
    "aclnnRotaryPositionEmbeddingV2": (
        f"{TENSOR} x, {TENSOR} cos, {TENSOR} sin, int64_t mode, {TENSOR} rotate, {OUT} out"
    ),
    "aclnnMatmul": f"{TENSOR} self, {TENSOR} mat2, {OUT} out, int8_t cube_math_type",
    "aclnnTransposeBatchMatMul": (
        f"{TENSOR} x1, {TENSOR} x2, {TENSOR} bias, {TENSOR} scale, const aclIntArray* perm_x1, "
        "const aclIntArray* perm_x2, const aclIntArray* perm_y, int8_t cube_math_type, int "
        f"batch_split_factor, {OUT} out"
    ),
    "aclnnRotateQuant": (
        f"{TENSOR} x, {TENSOR} rotation, {TENSOR} alpha, int64_t axis, const char* round_mode, "
        f"int64_t scale_alg, double dst_type_max, bool trans, {OUT} y, {OUT} scale"
    ),
    "aclnnMoeGatingTopK": (
        f"{TENSOR} x, {TENSOR} bias, int64_t k, int64_t k_group, int64_t group_count, "
        "int64_t group_select_mode, int64_t renorm, int64_t norm_type, bool out_flag, "
        f"double routed_scaling_factor, double eps, {OUT} y, {OUT} expert_idx, {OUT} out"
    ),
    "aclnnDynamicQuantV4": (
        f"{TENSOR} x, {TENSOR} smooth_scales, {TENSOR} group_index, aclDataType dst_type, "
        "bool symmetrical, const char* quant_mode, float dst_type_max, "
        f"{OUT} y, {OUT} scale, {OUT} offset"
    ),
}


@pytest.fixture(scope="module")
def signatures():
    written = "".join(path.read_text() for path in SOURCES.glob("*.cpp"))
    names = sorted(set(re.findall(r"^(?:OP|NAMED)\((aclnn\w+),", written, re.MULTILINE)))
    code, output = run("signatures.py", *names, "aclnnNothing", "aclnnMulGetWorkspaceSize")
    assert code == 0, output
    return json.loads(next(line for line in output.splitlines() if line.startswith("{")))


def test_every_operator_has_one(signatures):
    missing = [name for name, signature in signatures.items() if signature is None]
    assert missing == ["aclnnNothing", "aclnnMulGetWorkspaceSize"] and len(signatures) > 400


@pytest.mark.parametrize("name", LAMBDAS)
def test_a_lambda_has_types(signatures, name):
    assert signatures[name] == ", ".join(LAMBDAS[name])


@pytest.mark.parametrize("name", STRUCTS)
def test_a_struct_has_names_too(signatures, name):
    assert signatures[name] == STRUCTS[name]


def test_versions_of_an_operator_differ_by_what_they_add(signatures):
    """The lists of a struct are put together from parts:
    names stay with their types across the seams.
    """
    v4, v5, nz = (
        signatures[f"aclnnGroupedMatmul{name}"].split(", ") for name in ("V4", "V5", "WeightNz")
    )
    assert [x for x in v5 if x not in v4] == ["const aclIntArray* tuning"]
    assert [x for x in nz if x not in v5] == ["int64_t quant_group"]
    assert v5[:2] == [f"{LIST} x", f"{LIST} weight"] and v5[-3] == f"{OUTS} out"
    assert nz.index("int64_t quant_group") == nz.index("const aclIntArray* tuning") + 1


def test_every_argument_of_a_struct_has_a_name(signatures):
    for name, signature in signatures.items():
        named = (
            [" " in argument.replace("const ", "") for argument in signature.split(", ")]
            if signature
            else []
        )
        assert all(named) or not any(named), name
