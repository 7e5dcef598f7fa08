"""All fused operators against their formulas: each module below checks its own on import."""

import sys

import fused_attention  # noqa: F401
import fused_attention_limits  # noqa: F401
import fused_cache  # noqa: F401
import fused_elementwise  # noqa: F401
import fused_finalize  # noqa: F401
import fused_gather  # noqa: F401
import fused_gating  # noqa: F401
import fused_mhc  # noqa: F401
import fused_moe  # noqa: F401
import fused_quant  # noqa: F401
import fused_quant_matmul  # noqa: F401
import fused_quant_matmul_refused  # noqa: F401
import fused_rotary  # noqa: F401
import fused_routing  # noqa: F401
import fused_sparse  # noqa: F401
import fused_sparse_indexer  # noqa: F401
import fused_sparse_quant  # noqa: F401
from fused_check import problems

for problem in problems:
    print("PROBLEM", problem)
print(f"fused: {len(problems)} problems")
sys.exit(bool(problems))
