"""The V4 family's norms, products, quantisers and gates against formulas: each module checks its
own on import.
"""

import sys
from importlib import import_module

from fused_check import finish, reseed

MODULES = (
    "v4_mhc",
    "v4_products",
    "v4_weight_nz",
    "v4_norm_quant",
    "v4_swiglu",
    "v4_gate",
    "v4_fp4",
    "v4_torch_npu",
)
for module in sys.argv[1:] or MODULES:
    reseed(module)
    import_module(module)
finish("dense")
