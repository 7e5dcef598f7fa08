"""The bits of a request: the same alone and beside others, in chunks, token by token, with drafts
and on any number of threads, because every product and sum has one order.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from seeds import generator

from dsv4_ascend.model.model import Model, load
from dsv4_ascend.tiny.release import SHIPPED

PROFILES = "official", "ideal", "a2a3-int8"
NEVER_STOP: frozenset[int] = frozenset()


@pytest.fixture(scope="module", params=PROFILES)
def model(request: pytest.FixtureRequest) -> Model:
    return load(SHIPPED, profile=request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _ids(length: int) -> list[int]:
    return torch.randint(2, 2048, (length,), generator=generator(length)).tolist()


PROMPTS = [_ids(n) for n in (1, 3, 40, 131, 150)]


@pytest.fixture(scope="module")
def alone(model: Model) -> list[torch.Tensor]:
    return [model.forward(prompt) for prompt in PROMPTS]


def test_logits_beside_others(model: Model, alone: list[torch.Tensor]) -> None:
    assert torch.equal(model.forward(PROMPTS), torch.cat(alone))


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_logits_in_chunks(model: Model, alone: list[torch.Tensor], chunk: int) -> None:
    assert torch.equal(model.forward(PROMPTS, chunk=chunk), torch.cat(alone))


def test_logits_token_by_token(model: Model, alone: list[torch.Tensor]) -> None:
    assert torch.equal(model.forward(PROMPTS, decode_from=2), torch.cat(alone))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_logits_on_other_threads(
    model: Model, alone: list[torch.Tensor], threads: None, count: int
) -> None:
    torch.set_num_threads(count)
    assert torch.equal(model.forward(PROMPTS), torch.cat(alone))


@pytest.mark.parametrize("draft_tokens", [1, 3])
def test_texts_with_drafts(model: Model, draft_tokens: int) -> None:
    options = {"max_new_tokens": 24, "stop_ids": NEVER_STOP, "temperature": 0.0}
    plain = [model.generate([prompt], **options)[0] for prompt in PROMPTS]
    assert model.generate(PROMPTS, **options) == plain
    assert model.generate(PROMPTS, draft_tokens=draft_tokens, **options) == plain
