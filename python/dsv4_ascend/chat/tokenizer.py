"""Text to token ids and back, with the checkpoint's own `tokenizer.json` (spec/v4.md 9.1)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import tokenizers

from dsv4_ascend.arguments import as_list, flag, integer
from dsv4_ascend.chat.prompt_text import Marker, PromptText
from dsv4_ascend.checkpoint.strict_json import FileProblem, read_text
from dsv4_backend.errors import ArgumentError, CheckpointError

FILE = "tokenizer.json"
_MAX_BYTES = 2**28
_MAX_ID = 2**32 - 1
_INCOMPLETE = "\ufffd"
_ONE_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
_PATIENCE = 4
"""A character has at most 4 bytes;
held tokens in excess of that are no character, and are looked at less often.
"""


class Tokenizer:
    """The byte-level BPE of a checkpoint.
    `bos` is the text of the begin-of-sentence token, or None.
    """

    def __init__(self, backend: tokenizers.Tokenizer, bos: str | None) -> None:
        self._backend, self.bos = backend, bos

    @classmethod
    def from_folder(cls, folder: Path, bos_token_id: int | None) -> Tokenizer:
        """Read `tokenizer.json`; the bos id is the configuration's.
        CheckpointError when missing or malformed.
        """
        path = folder / FILE
        if not path.is_file():
            raise CheckpointError(
                f"{folder}: no {FILE}; give token ids instead of text (command line: --input-ids)"
            )
        try:
            backend = tokenizers.Tokenizer.from_str(read_text(path, _MAX_BYTES).decode("utf-8"))
        except FileProblem as problem:
            raise CheckpointError(f"{path}: {problem}") from None
        except Exception as error:  # the only class that tokenizers raises
            raise CheckpointError(f"{path}: not a tokenizer file: {error}") from error
        return cls(backend, None if bos_token_id is None else backend.id_to_token(bos_token_id))

    @property
    def size(self) -> int:
        """Number of token ids, special ones included."""
        return int(self._backend.get_vocab_size())

    def token_id(self, token: str) -> int | None:
        """Id of a special string such as `<｜User｜>`, or None."""
        found = self._backend.token_to_id(token)
        return None if found is None else int(found)

    def encode(self, text: str, *, bos: bool = False, control: bool = False) -> list[int]:
        """Token ids of `text`,
        of which only a `PromptText`'s markers become control tokens: the safe mode.

        control: every spelling of a control token (the tokenizer's added vocabulary) becomes that
        token, whoever wrote it. bos: start with the bos token, unless the text does so itself.
        ArgumentError for a lone surrogate, which is how Python reads an argument that is not UTF-8,
        for what is no string, and for a marker that this tokenizer does not have as a token: as
        plain text it would not mean what it says.
        """
        _check_text(text)
        self._check_markers(text)
        if flag("control", control):
            ids = self._ids(self._backend, text)
        else:
            pieces = text.segments() if isinstance(text, PromptText) else iter([text])
            ids = [id_ for piece in pieces for id_ in self._piece(piece)]
        first = self.token_id(self.bos) if flag("bos", bos) and self.bos is not None else None
        return ids if first is None or ids[:1] == [first] else [first, *ids]

    def _check_markers(self, text: str) -> None:
        markers = text.segments() if isinstance(text, PromptText) else ()
        for marker in markers:
            if isinstance(marker, Marker) and self.token_id(marker) is None:
                raise ArgumentError(
                    f"text: found the marker {marker}, which is no token of this {FILE}, expected "
                    "markers it has; leave out what the chat needs it for, or use a checkpoint "
                    "whose tokenizer has it"
                )

    def _piece(self, piece: str) -> list[int]:
        if isinstance(piece, Marker):
            return self._ids(self._backend, piece)
        ids = self._ids(self._without_added, piece)
        if not self._added.isdisjoint(ids):
            token = self._backend.id_to_token(next(i for i in ids if i in self._added))
            problem = (
                f"text: found {token}, which merges spell, expected no control token; "
                "see control=True"
            )
            raise ArgumentError(problem)
        return ids

    @staticmethod
    def _ids(backend: tokenizers.Tokenizer, text: str) -> list[int]:
        return list(backend.encode(str(text), add_special_tokens=False).ids)

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._backend.get_added_tokens_decoder())

    @cached_property
    def _special(self) -> frozenset[int]:
        """Ids that decoding leaves out."""
        return frozenset(
            i for i, token in self._backend.get_added_tokens_decoder().items() if token.special
        )

    @cached_property
    def _without_added(self) -> tokenizers.Tokenizer:
        """The same model, which this shares, before any token was added to its vocabulary."""
        plain = tokenizers.Tokenizer(self._backend.model)
        if self._backend.normalizer is not None:
            plain.normalizer = self._backend.normalizer
        if self._backend.pre_tokenizer is not None:
            plain.pre_tokenizer = self._backend.pre_tokenizer
        return plain

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; incomplete UTF-8 at either end becomes U+FFFD.
        ArgumentError for what is no id.
        """
        listed = as_list(ids) if not isinstance(ids, str | bytes) else None
        if not isinstance(listed, Iterable):
            raise ArgumentError(f"ids: found {ids!r:.40}, expected token ids")
        checked = [integer("ids", id_, 0, _MAX_ID) for id_ in listed]
        skip = flag("skip_special", skip_special)
        return str(self._backend.decode(checked, skip_special_tokens=skip))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text piece by piece as ids arrive, in time linear in their number;
        joined, it is the text of all of them.

        A character split over tokens comes out whole: tokens are held while the text ends in the
        middle of one. Those that stand for one byte each (`<0xE2>`) are held until another token
        comes: decoders judge them together.
        """
        # The last tokens shown: what the next ones look like may depend on them.
        shown: list[int] = []
        held: list[int] = []
        due = 1
        for token in ids:
            if token in self._special:
                continue
            held.append(token)
            if len(held) < due or _ONE_BYTE.fullmatch(self._backend.id_to_token(token) or ""):
                continue
            before, text = self.decode(shown), self.decode(shown + held)
            if text.endswith(_INCOMPLETE):
                due = len(held) + 1 if len(held) < _PATIENCE else 2 * len(held)
                continue
            yield text[len(before) :]
            shown, held, due = (held if text != before else shown + held), [], 1
        if held:
            yield self.decode(shown + held)[len(self.decode(shown)) :]


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise ArgumentError(f"text: found {text!r:.40}, expected a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(
            f"text: found {text[error.start]!r} at {error.start}, expected Unicode"
        ) from None
