"""Mutated checkpoint folders under an audit hook and an address-space limit.

    python fuzz_checkpoints.py COUNT SEED      prints one JSON line of what happened

Every folder must load correctly or give one of our errors, quickly, with no execution, no writing
and no socket.
"""

import json
import random
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from tiny_checkpoints import bits, read_raw, write_raw, write_tiny

from dsv4_ascend.checkpoint.folder import open_checkpoint
from dsv4_ascend.checkpoint.layout import layout
from dsv4_backend.errors import Dsv4Error

HARMLESS = {"open", "os.listdir", "mmap.__new__"}
JUNK = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**30,
    1.5,
    1e308,
    "",
    "x",
    "F32",
    "\0",
    "../x",
    [],
    [[]],
    {},
    {"a": 1},
    [1] * 99,
]
WRITE_FLAGS = 0o1 | 0o2 | 0o100 | 0o1000 | 0o2000


class Auditor:
    """Records every forbidden audit event while armed."""

    def __init__(self) -> None:
        self.armed = False
        self.events: Counter[str] = Counter()
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple) -> None:
        if self.armed and (event not in HARMLESS or (event == "open" and self._writes(*arguments))):
            self.events[event] += 1

    @staticmethod
    def _writes(_path, mode, flags) -> bool:
        return bool((mode and set(mode) & set("wax+")) or (flags or 0) & WRITE_FLAGS)


def assert_alive(auditor: Auditor, scratch: Path) -> None:
    """The hook must see an execution, a file written, a process and a socket."""
    auditor.armed = True
    exec("0")
    (scratch / "canary").write_text("")
    subprocess.run(["true"], check=True)
    socket.socket().close()
    auditor.armed = False
    assert {"exec", "open", "subprocess.Popen", "socket.__new__"} <= set(auditor.events)
    auditor.events.clear()


def mutate_json(value: dict, dice: random.Random) -> None:
    """Change one place of a JSON object in place, at any depth."""
    while True:
        key = dice.choice([*value])
        inner = value[key]
        if isinstance(inner, dict) and inner and dice.random() < 0.8:
            value = inner
            continue
        break
    kind = dice.randrange(6)
    if kind == 0:
        del value[key]
    elif kind == 1:
        value[key + dice.choice(["x", "\0", "/", "", " "])] = value.pop(key)
    elif kind == 2:
        value[dice.choice([*value])] = value[key]
    elif kind == 3 and isinstance(inner, list) and inner:
        inner[dice.randrange(len(inner))] = dice.choice([*JUNK, *inner])
    elif kind == 4 and type(inner) is int:
        value[key] = inner + dice.choice([-1, 1, 8, -8, 2**32])
    else:
        value[key] = dice.choice(JUNK)


def mutate_bytes(raw: bytes, dice: random.Random, within: int) -> bytes:
    """Flip, cut, repeat or insert bytes near the start."""
    place = dice.randrange(min(within, len(raw)))
    kind = dice.randrange(5)
    if kind == 0:
        return raw[:place] + bytes([raw[place] ^ 1 << dice.randrange(8)]) + raw[place + 1 :]
    if kind == 1:
        return raw[:place]
    if kind == 2:
        return raw[:place] + raw[max(0, place - dice.randrange(200)) :]
    if kind == 3:
        return (
            raw[:place]
            + dice.choice([b'"', b"{", b"}", b",", b"[", b"\0", b"\xff", b"1", b"NaN", b" "])
            + raw[place:]
        )
    return raw + bytes(dice.randrange(1, 20))


def mutate_folder(folder: Path, dice: random.Random) -> None:
    """One to three mutations of config, index or shards."""
    for _ in range(dice.randint(1, 3)):
        path = dice.choice(sorted(folder.iterdir()))
        raw = path.read_bytes()
        if dice.random() < 0.3:
            path.write_bytes(mutate_bytes(raw, dice, len(raw) if dice.random() < 0.3 else 4000))
        elif path.suffix == ".json":
            try:
                value = json.loads(raw)
            except ValueError:
                continue
            if isinstance(value, dict) and value:
                mutate_json(value, dice)
                path.write_text(json.dumps(value))
        elif dice.random() < 0.1:
            path.rename(
                folder
                / dice.choice(["other.safetensors", "model-00009-of-00009.safetensors", "x.bin"])
            )
        else:
            try:
                header, data = read_raw(path)
            except ValueError:
                continue
            if header:
                mutate_json(header, dice)
                write_raw(path, header, data)


def check_loaded(checkpoint) -> None:
    """A folder that loads must hold exactly what its files say."""
    headers = {}
    for path in checkpoint.path.glob("*.safetensors"):
        header, data = read_raw(path)
        for name, entry in header.items():
            headers[name] = data[slice(*entry["data_offsets"])] if name != "__metadata__" else b""
    expected = layout(checkpoint.config)
    assert {name for name in checkpoint.names() if not name.endswith(".scale")} == set(expected)
    for name, tensor in checkpoint.tensors():
        assert bits(tensor) == headers[name], name


def main(count: int, seed: int) -> None:
    """Run `count` mutated folders."""
    dice, auditor, outcome = random.Random(seed), Auditor(), Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        assert_alive(auditor, Path(scratch))
        originals = [Path(scratch) / "one", Path(scratch) / "many"]
        write_tiny(originals[0])
        write_tiny(originals[1], shard_bytes=60_000)
        check_loaded(open_checkpoint(originals[1]))
        folder = Path(scratch) / "mutant"
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 512 * 2**20,) * 2)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(count):
            shutil.copytree(dice.choice(originals), folder)
            mutate_folder(folder, dice)
            started = time.monotonic()
            auditor.armed = True
            try:
                checkpoint = open_checkpoint(folder)
                total = sum(
                    int(tensor.view(torch.uint8).sum()) for _, tensor in checkpoint.tensors()
                )
                auditor.armed = False
                check_loaded(checkpoint)
                outcome["loaded"] += total >= 0
            except Dsv4Error as error:
                outcome[type(error).__name__] += 1
            finally:
                auditor.armed = False
            slowest = max(slowest, time.monotonic() - started)
            shutil.rmtree(folder)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    print(
        json.dumps(
            {"outcome": outcome, "events": auditor.events, "slowest": slowest, "grown_mb": grown}
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
