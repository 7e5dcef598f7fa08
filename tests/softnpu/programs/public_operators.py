"""Operators that torch_npu's public tests call, against formulas: each module checks its own."""

import sys
from importlib import import_module

from fused_check import finish, reseed

MODULES = (
    "public_norms",
    "public_moe",
    "public_layers",
    "public_graph",
    "public_quant",
    "public_boxes",
    "public_blocks",
    "public_mla",
    "public_runtime",
    "public_devices",
)
for module in sys.argv[1:] or MODULES:
    reseed(module)
    import_module(module)
finish("public")
