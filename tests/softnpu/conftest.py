"""Where the software device is missing, each file here is one test that says what is missing;
none is imported.
"""

from __future__ import annotations

import pytest
import tier


def pytest_pycollect_makemodule(module_path, parent):
    what = tier.missing()
    return Absent.from_parent(parent, path=module_path, what=what) if what else None


class Absent(pytest.File):
    def __init__(self, *, what, **node):
        super().__init__(**node)
        self.what = what

    def collect(self):
        yield Missing.from_parent(self, name="softnpu", what=self.what)


class Missing(pytest.Item):
    def __init__(self, *, what, **node):
        super().__init__(**node)
        self.what = what

    def reportinfo(self):
        return self.path, None, f"{self.path.name}: the software device"

    def runtest(self):
        tier.lacking(self.what)
