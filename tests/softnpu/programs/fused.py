"""All fused operators against their formulas: each module fused_*.py checks its own on import."""

import sys
from importlib import import_module
from pathlib import Path

from fused_check import problems

for module in sorted(Path(__file__).parent.glob("fused_*.py")):
    import_module(module.stem)
for problem in problems:
    print("PROBLEM", problem)
print(f"fused: {len(problems)} problems")
sys.exit(bool(problems))
