"""All fused operators against their formulas: each module fused_*.py checks its own on import."""

from importlib import import_module
from pathlib import Path

from fused_check import finish

for module in sorted(Path(__file__).parent.glob("fused_*.py")):
    import_module(module.stem)
finish("fused")
