"""One voice for all ranks of a command.

Rank 0 speaks. What another rank has to say is told when it ends, unless it is a mistake in the
command line, which every rank finds.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from dsv4_ascend.cli import USAGE

_HEAD_START = 5.0
"""Seconds that a rank waits with a mistake in the command line before it ends: launchers end the
others when one ends, and rank 0 is to say it first.
"""


def rank_prefix() -> str:
    """How lines of this process begin: "rank 1 of 4: ", nothing for the only one."""
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE", "1")
    return "" if rank is None or world == "1" else f"rank {rank} of {world}: "


@contextmanager
def one_voice() -> Iterator[None]:
    """While inside, a rank that is not 0 prints nothing; what went to its standard error comes
    afterwards, unless it ends with a usage error.
    """
    if not rank_prefix() or os.environ["RANK"] == "0":
        yield
        return
    streams, kept = (sys.stdout, sys.stderr), io.StringIO()
    with open(os.devnull, "w") as nowhere:
        sys.stdout, sys.stderr = nowhere, kept
        code: object = None
        try:
            yield
        except BaseException as error:
            code = error.code if isinstance(error, SystemExit) else error
            raise
        finally:
            sys.stdout, sys.stderr = streams
            if code == USAGE:
                time.sleep(_HEAD_START)
            elif code:
                with suppress(OSError):
                    sys.stderr.write(kept.getvalue())
