"""Messages to prompt text, as the release encodes them (spec/v4.md 9).
Messages are dicts in OpenAI's form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsv4_ascend.arguments import flag
from dsv4_ascend.chat import preview, recipe
from dsv4_ascend.chat.markers import BOS
from dsv4_ascend.chat.messages import Message, check_messages
from dsv4_ascend.chat.prompt_text import PromptText
from dsv4_ascend.chat.release_texts import ReleaseTexts
from dsv4_backend.errors import ArgumentError

REVISIONS = ("preview", "recipe")


@dataclass(frozen=True)
class ChatMode:
    """thinking: the assistant reasons before it answers.
    effort: "low", "high", "max", as far as the release knows it.

    drop_thinking: reasoning of earlier turns is removed; off when any message carries tools. Only
    for `preview`.
    revision: whose rules hold. `preview` is the script in the releases' encoding folder, `recipe`
    DeepSeek's later request library. What `recipe` does differently:

    - every assistant turn opens itself, and after the last message a new one opens, also behind an
      answer, a reminder or a system text; an answer with `prefix` (or `wo_eos`) at the end is left
      open to be continued;
    - system texts move to the front, joined by an empty line; tools of any message and a response
      format follow them;
    - empty texts in a run of user messages or system texts are left out; a tool result always opens
      a user turn;
    - reasoning is kept if there are tools (in both modes) or the answer has `prefix`, and dropped
      otherwise; None gives `</think>` alone, an empty reasoning `<think></think>`;
    - no effort given means "high"; "xhigh" is "high";
    - there are no tasks, no developer messages and no `earlier` messages.
    """

    thinking: bool = False
    effort: str | None = None
    drop_thinking: bool = True
    revision: str = "preview"

    def __post_init__(self) -> None:
        for name in ("thinking", "drop_thinking"):
            flag(f"chat: {name}", getattr(self, name))
        if self.revision not in REVISIONS:
            raise ArgumentError(
                f"chat: revision: found {self.revision!r:.40}, expected {' or '.join(REVISIONS)}"
            )


def encode_messages(
    messages: Sequence[Message],
    mode: ChatMode | None = None,
    texts: ReleaseTexts | None = None,
    *,
    earlier: Sequence[Message] = (),
) -> PromptText:
    """The prompt for `messages`, which follow `earlier` ones that are encoded already.

    The result is a string that knows its markers: what a message says never becomes a
    control token, unless the tokenizer is asked for it
    (`Tokenizer.encode(..., control=True)`). ArgumentError names a bad message;
    CheckpointError a literal text that the release did not bring.
    """
    chat, release = mode or ChatMode(), texts or ReleaseTexts()
    release.check_effort(chat.effort, chat.revision)
    check_messages(messages)
    check_messages(earlier)
    if chat.revision == "recipe":
        if earlier:
            raise ArgumentError(
                "chat: earlier: found messages, expected none with revision recipe; "
                "encode all at once"
            )
        return PromptText.of([BOS, *recipe.render(messages, chat.thinking, chat.effort, release)])
    opening = [] if earlier else [BOS]
    drop = chat.drop_thinking and not any(m.get("tools") for m in (*earlier, *messages))
    pieces = preview.render(messages, earlier, chat.thinking, chat.effort, drop, release)
    return PromptText.of([*opening, *pieces])
