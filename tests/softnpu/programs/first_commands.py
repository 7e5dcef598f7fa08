"""What a user of an NPU runs first, over softnpu: tokens and logits
of the shipped model against the CPU's. Usage: first_commands.py FOLDER [more]

Tokens are the same. Logits of profile ideal lie within 1e-4, where only the order of fp32 sums
differs; of official within 1e-2 of their spread (RMS), since such a difference may flip a rounding
to bf16 (9e-4 seen, mostly 0).
"""

import contextlib
import io
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import dsv4_ascend
from dsv4_ascend.cli.main import main
from dsv4_ascend.tiny.release import SHIPPED
from dsv4_backend import dispatch

folder = Path(sys.argv[1])
ids, output = folder / "ids.json", folder / "logits.safetensors"
ids.write_text(str([0, *range(40, 50)]))
problems = []


def printed(line):
    """Standard output of a command, which must succeed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            main(line.split())
        except SystemExit as left:
            if left.code:
                problems.append(f"{line}: exit code {left.code}")
    return out.getvalue()


def same(what, got, want):
    print(f"{what}: {got!r:.60}")
    if got != want:
        problems.append(f"{what}: {got!r}, expected {want!r}")


def generates(options, device="npu"):
    texts = [
        printed(f"generate --max-new-tokens 4 --device {where} {options}")
        for where in (device, "cpu")
    ]
    same(f"generate {options} on {device}", *texts)
    return texts[0]


def logits(options):
    got, want = (
        written(f"logits --input-ids {ids} --output {output} {options} --device {d}")
        for d in ("npu", "cpu")
    )
    difference = got - want
    close = (
        difference.abs().max() < 1e-4
        if "ideal" in options
        else difference.square().mean().sqrt() < 1e-2 * want.std()
    )
    same(
        f"logits {options}", (bool(close), got.argmax(1).tolist()), (True, want.argmax(1).tolist())
    )


def written(line):
    output.unlink(missing_ok=True)
    printed(line)
    return load_file(output)["logits"]


drafted = generates("--temperature 0 --draft-tokens 2")
logits("--chunk 4")
logits("--profile ideal --decode-from 8")
if sys.argv[2:]:
    same(
        "without drafts",
        printed("generate --max-new-tokens 4 --device cpu --temperature 0"),
        drafted,
    )
    generates("--chat --prompt hello --profile ideal", "npu:1")
    generates("--thinking --chat --seed 5 --profile ideal")
    logits("--decode-from 0")
    npu, cpu = (dsv4_ascend.load(SHIPPED, device=device) for device in ("npu:1", "cpu"))
    ragged = [[0, 5, 9, 11, 300], [0], [0, 7, 8]]
    same("ragged batch", *(model.generate(ragged, max_new_tokens=3) for model in (npu, cpu)))
    found = npu.forward(torch.tensor([0, 5, 9]))
    same(
        "device of forward",
        (found.device.type, found.device.index, found.dtype),
        ("npu", 1, torch.float32),
    )
    same("native on npu", dispatch.support("rms_norm", found, found[0], 1e-6).native, True)
    same(
        "native on npu",
        dispatch.support("act_qdq", found, 64, 0).native,
        False,
    )
for problem in problems:
    print("PROBLEM", problem)
print(f"first commands: {len(problems)} problems")
sys.exit(bool(problems))
