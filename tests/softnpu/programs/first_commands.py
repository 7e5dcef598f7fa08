"""What a user of an NPU runs first: tokens and logits on npu, over softnpu, against the CPU's. Usage: first_commands.py FOLDER

Both sides run the operators' references: softnpu's kernels are ATen's, so that the bits are the same.
"""

import contextlib
import io
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import dsv4_ascend
from dsv4_ascend.cli.main import main
from dsv4_ascend.tiny.release import SHIPPED
from dsv4_backend import dispatch

folder = Path(sys.argv[1])
ids = folder / "ids.json"
ids.write_text(json.dumps([0, *range(40, 60)]))


def printed(line):
    """Standard output of a command of this process; it must succeed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main(line.split())
    return out.getvalue()

import time
for line in ("generate --max-new-tokens 6 --temperature 0 --draft-tokens 2", "generate --max-new-tokens 4 --profile ideal --chat"):
    texts = []
    for device in ("cpu", "npu", "npu:1"):
        t = time.time()
        texts.append(printed(f"{line} --device {device}"))
        print(device, repr(texts[-1]), time.time() - t)
for line in ("", "--chunk 8", "--profile ideal --decode-from 18", "--profile ideal"):
  for policy in ("auto", "reference"):
    found = []
    for device in ("cpu", "npu"):
        t = time.time()
        output = folder / f"{device}.safetensors"
        with dispatch.use(policy):
            printed(f"logits --input-ids {ids} --output {output} --device {device} {line}")
        found.append(load_file(output)["logits"])
        print(device, time.time() - t)
    print(line, policy, (found[0] - found[1]).abs().max(), torch.equal(*found))
