"""The attention operators of CANN 9.1's V4 family against their documents: each module checks its
own on import. `v4_attention.py [absent]`: that a CANN before 9.1 has none of them.
"""

import sys
from importlib import import_module

from aclnn import call, parameters
from fused_check import finish, refused, reseed

MODULES = ("v4_rotary", "v4_mla", "v4_mla_quant", "v4_compressor", "v4_indexer", "v4_quant_cache",
           "v4_scatter")  # fmt: skip


OPERATORS = (
    "InplacePartialRotaryMul",
    "SparseFlashMla",
    "SparseFlashMlaMetadata",
    "MixedQuantSparseFlashMla",
    "MixedQuantSparseFlashMlaMetadata",
    "Compressor",
    "LightningIndexerV2",
    "LightningIndexerV2Metadata",
    "QuantLightningIndexerV2",
    "QuantLightningIndexerV2Metadata",
    "KvCompressEpilog",
    "IndexerQuantCache",
)


def absent():
    """Refused by version whatever the arguments are, here nulls and zeros."""
    for operator in OPERATORS:
        symbol = f"aclnn{operator}"
        kinds = {"double": 0.0, "float": 0.0, "int64_t": 0, "bool": False, "char*": ""}
        arguments = [kinds.get(c_type) for c_type, _ in parameters(symbol)]
        refused(
            symbol,
            lambda symbol=symbol, arguments=arguments: call(symbol, *arguments),
            "does not exist before CANN 9.1.0",
            161002,
        )


if sys.argv[1:] == ["absent"]:
    absent()
else:
    for module in MODULES:
        reseed(module)
        import_module(module)
finish("attention of V4")
