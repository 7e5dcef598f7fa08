"""Tests of every folder may ask softnpu/tier.py whether the software device is there."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "softnpu"))
