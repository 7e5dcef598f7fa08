"""`dsv4-ascend generate`: the text (or the ids) alone on standard output,
speed on standard error.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from dsv4_ascend.arguments import MAX_SEED
from dsv4_ascend.chat.encoding import ChatMode, encode_messages
from dsv4_ascend.chat.messages import Message
from dsv4_ascend.chat.release_texts import ReleaseTexts
from dsv4_ascend.cli.inputs import STDIN, check_ids, read_ids, read_messages, read_text
from dsv4_ascend.cli.loading import AllowUnknown, CheckpointFolder, ProfileName, load_model
from dsv4_ascend.cli.ranks import DataRanks, ExpertRanks, TensorRanks, on_ranks
from dsv4_ascend.model.generation import Sampling
from dsv4_ascend.model.model import Model
from dsv4_backend.errors import ArgumentError

DEFAULT_PROMPT = "def "

_Text = Annotated[str | None, typer.Option(help="Text to continue, or - for standard input.")]
_IdsFile = Annotated[Path | None, typer.Option(help="File with token ids, as of logits, or -.")]
_MessagesFile = Annotated[Path | None, typer.Option(help="JSON file with a chat's messages, or -.")]
_TopP = Annotated[float, typer.Option(help="Keep the most likely tokens up to this probability.")]
_Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the sampling noise.")]
_Chat = Annotated[bool, typer.Option("--chat", help="Encode the text as a user's message.")]
_Thinking = Annotated[bool, typer.Option("--thinking", help="Chat: let the model reason first.")]
_Effort = Annotated[
    str | None, typer.Option(help="Chat: low, high or max, as the release knows them.")
]
_Encoding = Annotated[str, typer.Option(help="Chat: preview (the release's script) or recipe.")]
_ControlTokens = Annotated[
    bool,
    typer.Option(
        "--control-tokens", help="What spells a control token in the text becomes that token."
    ),
]
_DraftTokens = Annotated[
    int, typer.Option(min=0, help="Draft with the MTP block; needs --temperature 0.")
]


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
        if self.tokens == 0:  # prefill ends with the first token, and none was wanted
            return f"prefill {prompt_tokens} tokens, 0.0 tokens/s"
        prefill, decode = self.first - self.start, self.last - self.first
        line = f"prefill {prompt_tokens} tokens, {prompt_tokens / max(prefill, 1e-9):.1f} tokens/s"
        if self.tokens > 1:
            speed = (self.tokens - 1) / max(decode, 1e-9)
            line += f"; decode {self.tokens} tokens, {speed:.1f} tokens/s"
        return line


@dataclass(frozen=True)
class _Prompt:
    """The one source that was given, and how it is to be read."""

    text: str = ""
    ids: list[int] | None = None
    messages: list[Message] | None = None
    mode: ChatMode | None = None
    control: bool = False

    def encode(self, model: Model) -> list[int]:
        """The token ids for `model`. ArgumentError for ids that it does not have."""
        if self.ids is not None:
            check_ids(self.ids, model.config.vocab_size)
            return self.ids
        text = self.text
        if self.messages is not None:
            texts = ReleaseTexts.from_folder(model.folder) if model.folder else None
            text = encode_messages(self.messages, self.mode, texts)
        return model.tokenizer.encode(text, bos=True, control=self.control)


def generate(
    checkpoint: CheckpointFolder = None,
    prompt: _Text = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File with the text, or -.")] = None,
    input_ids: _IdsFile = None,
    messages: _MessagesFile = None,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.6,
    top_p: _TopP = 1.0,
    seed: _Seed = 33377335,
    device: Annotated[str, typer.Option(help="cpu or npu.")] = "cpu",
    profile: ProfileName = None,
    chat: _Chat = False,
    thinking: _Thinking = False,
    effort: _Effort = None,
    encoding: _Encoding = "preview",
    control_tokens: _ControlTokens = False,
    draft_tokens: _DraftTokens = 0,
    eager: Annotated[bool, typer.Option("--eager", help="On npu: no captured graphs.")] = False,
    allow_unknown: AllowUnknown = None,
    tp: TensorRanks = None,
    ep: ExpertRanks = None,
    dp: DataRanks = None,
) -> None:
    """Generate text from a prompt and stream it.

    One of --prompt, --prompt-file, --input-ids, --messages; else the prompt is 'def '. Text is
    text: <think> in it is seven characters, not a control token, unless --control-tokens is given.
    --input-ids on a checkpoint without tokenizer.json prints token ids.
    """
    sources = {
        "--prompt": prompt,
        "--prompt-file": prompt_file,
        "--input-ids": input_ids,
        "--messages": messages,
    }
    given = [name for name, value in sources.items() if value is not None]
    if len(given) > 1:
        raise typer.BadParameter("give one source of the prompt", param_hint=" and ".join(given))
    if input_ids is not None and (chat or control_tokens):
        raise typer.BadParameter("ids need no encoding", param_hint="--input-ids")
    chatting = chat or messages is not None
    for name, used in (
        ("--thinking", thinking),
        ("--effort", effort is not None),
        ("--encoding", encoding != "preview"),
    ):
        if used and not chatting:
            raise ArgumentError(f"{name}: only with --chat or --messages")
    mode = ChatMode(thinking, effort, revision=encoding)
    found = _read(prompt, prompt_file, input_ids, messages)
    if chat and found.messages is None:
        found = replace(found, messages=[{"role": "user", "content": found.text}])
    found = replace(found, mode=mode, control=control_tokens)
    options = Sampling(temperature, top_p, seed)
    with on_ranks(device, tp, ep, dp) as (parallel, own):
        model = load_model(checkpoint, own, profile, allow_unknown, parallel)
        _run(model, found, options, max_new_tokens, draft_tokens, eager)


def _read(
    prompt: str | None, prompt_file: Path | None, input_ids: Path | None, messages: Path | None
) -> _Prompt:
    if messages is not None:
        return _Prompt(messages=read_messages(messages))
    if input_ids is not None:
        return _Prompt(ids=read_ids(input_ids))
    if prompt == STDIN:
        return _Prompt(read_text(Path(STDIN), "--prompt"))
    if prompt_file is not None:
        return _Prompt(read_text(prompt_file, "--prompt-file"))
    return _Prompt(DEFAULT_PROMPT if prompt is None else prompt)


def _run(
    model: Model,
    prompt: _Prompt,
    sampling: Sampling,
    max_new_tokens: int,
    draft_tokens: int,
    eager: bool,
) -> None:
    ids = prompt.encode(model)
    clock = _Clock()
    tokens = model.stream(
        [ids],
        max_new_tokens=max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        draft_tokens=draft_tokens,
        eager=eager,
    )
    watched = clock.watch(tokens)
    as_ids = prompt.ids is not None and not model.has_tokenizer
    for piece in (f"{token} " for token in watched) if as_ids else model.tokenizer.stream(watched):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    summary = clock.summary(len(ids))
    if model.draft_acceptance is not None:
        summary += f"; {model.draft_acceptance:.0%} of drafted tokens accepted"
    print(summary, file=sys.stderr)
