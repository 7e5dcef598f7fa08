"""Tests of every folder share the helpers in model/ (tiny_networks, tiny_checkpoints)."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "model"))
