"""Stands for the package expecttest: torch's own test module wants its base class of tests,
which samples.py does not use.
"""

from unittest import TestCase  # noqa: F401
