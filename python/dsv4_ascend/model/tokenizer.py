"""Text to token ids and back, with the checkpoint's own `tokenizer.json` (spec/v4.md 9.1)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers

from dsv4_backend.errors import ArgumentError, CheckpointError

FILE = "tokenizer.json"


class Tokenizer:
    """The byte-level BPE of a checkpoint. `bos` is the text of the begin-of-sentence token, or None."""

    def __init__(self, backend: tokenizers.Tokenizer, bos: str | None) -> None:
        self._backend, self.bos = backend, bos

    @classmethod
    def from_folder(cls, folder: Path, bos_token_id: int | None) -> Tokenizer:
        """Read `tokenizer.json`; the bos id is the configuration's. CheckpointError when missing or malformed."""
        path = folder / FILE
        if not path.is_file():
            raise CheckpointError(f"{folder}: no {FILE}; give token ids instead of text")
        try:
            backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
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

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Token ids of `text`; special strings inside it become their tokens. bos: start with the bos token.

        ArgumentError for a lone surrogate, which is how Python reads an argument that is not UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ArgumentError(f"text: found {text[error.start]!r} at {error.start}, expected Unicode") from None
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        bos_id = self.token_id(self.bos) if bos and self.bos is not None else None
        return ids if bos_id is None else [bos_id, *ids]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; incomplete UTF-8 at either end becomes U+FFFD."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text piece by piece as ids arrive; a character split over tokens comes out whole."""
        held: list[int] = []
        done = ""
        for token in ids:
            held.append(token)
            text = self.decode(held)
            if not text.endswith("\ufffd"):
                yield text[len(done) :]
                done = text
                if text.endswith("\n"):
                    held, done = [], ""
        if held:
            yield self.decode(held)[len(done) :]
