"""The shipped checkpoint through AutoModelForCausalLM, the page's example, bench and doctor."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dsv4_ascend
from dsv4_ascend.bench.transformers_models import SIZES, section, transformers_models
from dsv4_ascend.cli import main as command
from dsv4_ascend.integrations.transformers import seams, sparse
from dsv4_ascend.tiny.release import SHIPPED

PAGE = Path(__file__).parents[3] / "docs" / "transformers.md"
TINY = {**SIZES, "hidden_size": 64, "head_dim": 32, "partial_rotary_factor": 0.5, "vocab_size": 128}


@pytest.fixture(scope="module")
def shipped():
    pytest.importorskip("accelerate", reason="transformers opens FP8 checkpoints with accelerate")
    with sparse():
        model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    return model.float().eval(), dsv4_ascend.load(SHIPPED, dtype=torch.float32)


@torch.no_grad()
def test_logits_of_the_shipped_checkpoint(shipped) -> None:
    theirs, ours = shipped
    ids = ours.tokenizer.encode("class Cache:\n    def __init__(self):\n" * 12, bos=True)
    assert len(ids) > 150, "past the first block of ratio 128"
    worst = (theirs(torch.tensor([ids])).logits[0] - ours.forward(ids)).abs().max()
    assert worst < 1e-4


def test_text_of_the_shipped_checkpoint(shipped) -> None:
    theirs, ours = shipped
    prompt = ours.tokenizer.encode("def ", bos=True)
    assert prompt[1:] == AutoTokenizer.from_pretrained(SHIPPED).encode("def ")
    text = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)
    assert text[0].tolist() == prompt + ours.generate([prompt], max_new_tokens=40)[0]


def test_the_example_of_the_page(shipped, capsys) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(compile(code, str(PAGE), "exec"), {})
    prompt = shipped[1].tokenizer.encode("def ", bos=True)
    text = shipped[1].generate([prompt], max_new_tokens=40)[0]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == prompt + text


def test_the_suite_of_bench() -> None:
    rows = transformers_models(2, TINY, (128, 256))
    assert [(row.what, row.context) for row in rows] == [
        (what, context) for what in ("prefill", "decode") for context in (128, 256)
    ]
    assert all(row.ratio == row.eager.median / row.sparse.median for row in rows)
    assert len(section(rows).rows) == 4


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ((seams.TESTED, []), ("ok", f"{seams.TESTED}, with the seams of DeepSeek V4")),
        (("6.0.0", []), ("ok", f"with the seams of DeepSeek V4, tested with {seams.TESTED}")),
        (("4.50.0", [seams.MODEL]), ("note", f"4.50.0, without {seams.MODEL}: no seams")),
        ((None, []), ("note", "not installed")),
    ],
)
def test_doctor(monkeypatch: pytest.MonkeyPatch, capsys, found, said: tuple[str, str]) -> None:
    assert seams.found() == (seams.version(), []), "the environment of the tests has them all"
    monkeypatch.setattr(seams, "found", lambda: found)
    with pytest.raises(SystemExit):
        command.main(["doctor", "--json"])
    findings = json.loads(capsys.readouterr().out)["findings"]
    (one,) = [f for f in findings if f["subject"] == "transformers"]
    assert one["state"] == said[0]
    assert said[1] in one["found"]
