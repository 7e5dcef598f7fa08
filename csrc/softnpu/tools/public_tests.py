"""Run listed tests of torch_npu, op-plugin and vllm-ascend on softnpu; one process per file.

    softnpu --soc Ascend910B3 -- python public_tests.py LIST RESULTS ROOT [SUITE ...]

LIST has tab-separated lines ``suite, class, test id, reason`` (``#`` begins a comment). ROOT holds
the sources, unpacked beside each other: ``op-plugin``, ``pytorch``, ``vllm-ascend``. RESULTS gets a
line ``suite, outcome, test id, reason`` per listed test; outcomes are passed, failed, skipped,
crashed and missing (not collected). Tests of a suite named ``unskip*`` run without their skip
decorators.
"""

from __future__ import annotations

import collections
import os
import signal
import sys
import time
from pathlib import Path

import pytest

SECONDS_PER_TEST = 150  # by pytest-timeout; one that no signal reaches has this long once more
FOLDERS = (
    "pytorch",
    "op-plugin/test/test_custom_ops",
    "vllm-ascend/tests/e2e/nightly/single_node/ops/singlecard_ops",
)


class Recorder:
    """A pytest plugin: keeps the listed tests and writes what happens to each, as it happens."""

    def __init__(self, names: set[str], log: Path) -> None:
        """Keep the tests of ``names`` (ids without the file); append to ``log``."""
        self.names, self.log = names, log

    def write(self, *fields: str) -> None:
        """Append one line, whole, so that a crash leaves what came before it."""
        with self.log.open("a") as stream:
            stream.write("\t".join(field.replace("\t", " ") for field in fields) + "\n")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Drop what is not listed, or ran before a crash."""
        items[:] = [item for item in items if name_of(item.nodeid) in self.names]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Note the test that a crash would belong to."""
        self.write("begun", name_of(nodeid))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the outcome; a later phase's failure replaces an earlier success."""
        if report.when == "call" or report.outcome != "passed":
            self.write(report.outcome, name_of(report.nodeid), last_error(report))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note why a file could not be imported."""
        if report.failed:
            self.write("unread", "", last_error(report))


def name_of(nodeid: str) -> str:
    """Return the part of a test id behind the file.

    torch ends the names of classes made for a device with NPU or PRIVATEUSE1, as it happens.
    """
    return nodeid.partition("::")[2].replace("PRIVATEUSE1::", "NPU::")


def last_error(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return the first lines that say what was raised, on one line."""
    if report.outcome == "passed":
        return ""
    said = [line for _, text in report.sections for line in text.splitlines()]
    lines = [line for line in said if line.startswith("softnpu: ")][:1]
    lines += [line[4:] for line in report.longreprtext.splitlines() if line.startswith("E   ")]
    text = " ".join(lines) or report.longreprtext
    return " ".join(text.split())[:600]


def without_skips() -> None:
    """Make the decorators that skip tests do nothing."""
    import unittest

    from torch_npu.testing import common_utils

    def keep(*_args: object, **_kwargs: object) -> object:
        return lambda test: test

    unittest.skip = unittest.skipIf = unittest.skipUnless = keep  # type: ignore[assignment]
    for name in ("SupportedDevices", "SkipIfNotGteCANNVersion", "skipIfUnsupportMultiNPU"):
        setattr(common_utils, name, keep)


def run_file(file: Path, names: set[str], log: Path, *, unskip: bool) -> None:
    """Run the named tests of one file in this process, which ends here."""
    os.chdir(file.parent)
    sys.path.insert(0, str(file.parent))
    if unskip:
        without_skips()
    output = os.open(log.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    options = ["-p", "no:cacheprovider", "-c", os.devnull, "--timeout", str(SECONDS_PER_TEST)]
    options += ["--rootdir", str(file.parent), "--import-mode", "importlib", str(file)]
    pytest.main(options, plugins=[Recorder(names, log)])
    sys.stdout.flush()
    os._exit(0)


def wait_for(child: int, log: Path) -> str:
    """Return how a process ended; end it when its log stood still for two tests' time."""
    moved = time.time()
    while time.time() < moved + 2 * SECONDS_PER_TEST:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "exit"
        time.sleep(0.2)
        moved = max(moved, log.stat().st_mtime if log.exists() else 0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "no end"


def read_log(log: Path) -> dict[str, tuple[str, str]]:
    """Return outcome and reason by test; one that began and has none is ``begun``."""
    found: dict[str, tuple[str, str]] = {}
    for line in log.read_text().splitlines() if log.exists() else []:
        outcome, name, reason = [*line.split("\t"), "", ""][:3]
        if found.get(name, ("", ""))[0] not in ("failed", "unread"):
            found[name] = (outcome, reason)
    return found


def outcomes(file: Path, names: set[str], log: Path, *, unskip: bool) -> dict[str, tuple[str, str]]:
    """Run the tests of one file, again without the one that ended the process, until all ran."""
    found: dict[str, tuple[str, str]] = {}
    left = set(names)
    while left:
        log.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            run_file(file, left, log, unskip=unskip)
        end = wait_for(child, log)
        new = read_log(log)
        why = new.pop("", ("", ""))[1]
        outcome = ("failed", "Timeout") if end == "no end" else ("crashed", end)
        lost = {name for name, (state, _) in new.items() if state == "begun"}
        found.update(new | dict.fromkeys(lost, outcome))
        left -= new.keys()
        if not lost:
            found.update(dict.fromkeys(left, ("missing", why)))
            break
    return found


def find(root: Path, name: str) -> Path:
    """Return where a listed file lies under ``root``."""
    places = [root / folder / name for folder in FOLDERS]
    return next((place for place in places if place.exists()), places[0])


def read_list(path: Path, suites: tuple[str, ...]) -> dict[tuple[str, str], set[str]]:
    """Return the names of the listed tests by suite and file; all suites if none is named."""
    tests: dict[tuple[str, str], set[str]] = collections.defaultdict(set)
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            suite, _, test = line.split("\t")[:3]
            if not suites or suite in suites:
                file, _, name = test.partition("::")
                tests[suite, file].add(name)
    return dict(sorted(tests.items(), key=lambda item: suites.index(item[0][0]) if suites else 0))


def main(listed: str, results: str, root: str, *suites: str) -> None:
    """Run the suites and write the results."""
    import torch_npu.testing.testcase  # noqa: F401  imported once, not in every child

    for (suite, file), names in read_list(Path(listed), suites).items():
        log = Path(results).with_suffix(f".{suite}.{Path(file).name}.log")
        found = outcomes(find(Path(root), file), names, log, unskip=suite.startswith("unskip"))
        with Path(results).open("a") as stream:
            for name, (outcome, reason) in sorted(found.items()):
                stream.write(f"{suite}\t{outcome}\t{file}::{name}\t{reason}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
