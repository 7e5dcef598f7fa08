"""`dsv4-ascend generate`: the text alone on standard output, speed on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from dsv4_ascend.cli.loading import AllowUnknown, load_model
from dsv4_ascend.model.chat import ChatMode, encode_messages
from dsv4_ascend.model.release_texts import ReleaseTexts
from dsv4_backend.errors import ArgumentError

DEFAULT_PROMPT = "def "
MAX_SEED = 2**64 - 1


class _Clock:
    """Passes tokens through and notes when the first and the last came."""

    def __init__(self) -> None:
        self.start = self.first = self.last = time.monotonic()
        self.tokens = 0

    def watch(self, stream: Iterator[tuple[int, int]]) -> Iterator[int]:
        """The token ids of the only prompt."""
        for _, token in stream:
            self.last = time.monotonic()
            self.first = self.last if self.tokens == 0 else self.first
            self.tokens += 1
            yield token

    def summary(self, prompt_tokens: int) -> str:
        """Prefill and decode speed in tokens per second."""
        if self.tokens == 0:
            return f"prefill {prompt_tokens} tokens, 0.0 tokens/s"  # it waits for the first token, and none was wanted
        prefill, decode = self.first - self.start, self.last - self.first
        line = f"prefill {prompt_tokens} tokens, {prompt_tokens / max(prefill, 1e-9):.1f} tokens/s"
        if self.tokens > 1:
            line += f"; decode {self.tokens} tokens, {(self.tokens - 1) / max(decode, 1e-9):.1f} tokens/s"
        return line


def generate(
    checkpoint: Annotated[Path | None, typer.Option(help="Folder; the shipped small model if absent.")] = None,
    prompt: Annotated[str, typer.Option(help="Text to continue, or the user's message with --chat.")] = DEFAULT_PROMPT,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.6,
    top_p: Annotated[float, typer.Option(help="Keep the most likely tokens up to this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the sampling noise.")] = 33377335,
    device: Annotated[str, typer.Option(help="cpu or npu.")] = "cpu",
    profile: Annotated[str, typer.Option(help="official (bf16) or ideal (fp32).")] = "official",
    chat: Annotated[bool, typer.Option("--chat", help="Encode the prompt as a chat message.")] = False,
    thinking: Annotated[bool, typer.Option("--thinking", help="With --chat: let the model reason first.")] = False,
    draft_tokens: Annotated[int, typer.Option(min=0, help="Draft with the MTP block; needs --temperature 0.")] = 0,
    allow_unknown: AllowUnknown = None,
) -> None:
    """Generate text from a prompt and stream it."""
    if thinking and not chat:
        raise ArgumentError("--thinking: only with --chat")
    model = load_model(checkpoint, device, profile, allow_unknown)
    ids = model.tokenizer.encode(prompt, bos=True)
    if chat:
        texts = ReleaseTexts.from_folder(model.folder) if model.folder else None
        ids = model.tokenizer.encode(encode_messages([{"role": "user", "content": prompt}], ChatMode(thinking), texts))
    clock = _Clock()
    tokens = model.stream(
        [ids],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        draft_tokens=draft_tokens,
    )
    for piece in model.tokenizer.stream(clock.watch(tokens)):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    summary = clock.summary(len(ids))
    if model.draft_acceptance is not None:
        summary += f"; {model.draft_acceptance:.0%} of drafted tokens accepted"
    print(summary, file=sys.stderr)
