"""Kill conversions at random points and finish them: kill_conversions.py SOURCE WANTED TARGET SEED
COUNT. WANTED is the finished folder; a conversion that is killed goes on in its folder.

Even numbers are killed at one of their calls of the operating system, in the middle of a write too;
odd ones by the clock. Prints the number of kills; fails where a file under its final name is not
what it is in WANTED, or where the finished folder is not WANTED.
"""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from dsv4_ascend.checkpoint.foreign import JOURNAL
from dsv4_ascend.convert.job import convert
from dsv4_ascend.convert.targets import TARGETS

CALLS = "pwrite", "fsync", "replace", "unlink", "open"


def fatal(calls):
    """Have this process die at the call of that number."""
    left = [calls]

    def wrapped(name, function):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] < 0:
                if name == "pwrite":
                    function(arguments[0], arguments[1][: len(arguments[1]) // 2], arguments[2])
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in CALLS:
        setattr(os, name, wrapped(name, getattr(os, name)))


def run(source, folder, target, calls):
    """The process that converts; it ends with 0 where it could finish."""
    child = os.fork()
    if child:
        return child
    if calls is not None:
        fatal(calls)
    try:
        convert(source, folder, TARGETS[target])
        os._exit(0)
    except BaseException as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)


def whole(folder, wanted):
    """Nothing under a final name is half there."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.name.startswith(".") and path.name != JOURNAL:
            right = wanted / path.relative_to(folder)
            assert path.read_bytes() == right.read_bytes(), path


def same(folder, wanted):
    names = [{str(p.relative_to(f)) for p in f.rglob("*")} for f in (folder, wanted)]
    assert names[0] == names[1], names[0] ^ names[1]
    whole(folder, wanted)


def main(source, wanted, target, seed, count):
    torch.set_num_threads(1)
    chance = random.Random(int(seed))
    base = Path(tempfile.mkdtemp(dir=wanted.parent))
    start = time.monotonic()
    os.waitpid(run(source, base / "timed", target, None), 0)
    duration, kills, number = time.monotonic() - start, 0, 0
    while kills < int(count):
        folder = base / str(number)
        calls = chance.randrange(120) if number % 2 == 0 else None
        child = run(source, folder, target, calls)
        if calls is None:
            time.sleep(chance.random() * duration)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            kills += 1
            whole(folder, wanted) if folder.exists() else None
            if chance.random() < 0.5:
                continue  # killed again, in the same folder
        else:
            assert os.WEXITSTATUS(status) == 0
        _, status = os.waitpid(run(source, folder, target, None), 0)
        assert status == 0
        same(folder, wanted)
        shutil.rmtree(folder)
        number += 1
    print(kills)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
