"""Prompt text that knows which of its characters are control markers and which somebody typed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

Range = tuple[int, int]


class Marker(str):
    """The spelling of a control token, written by the encoding itself."""


class PromptText(str):
    """A string with the ranges of its markers:
    only they become control tokens when a tokenizer encodes it.

    markers: half-open (start, end) ranges of characters, ascending and disjoint. Everything between
    them is plain text, whatever it spells. `+` keeps the ranges; every other string operation gives
    plain text without markers.
    """

    markers: tuple[Range, ...]

    def __new__(cls, text: str = "", markers: Iterable[Range] = ()) -> PromptText:
        """The text with its markers as given."""
        self = super().__new__(cls, text)
        self.markers = tuple(markers)
        return self

    @classmethod
    def of(cls, pieces: Iterable[str]) -> PromptText:
        """The pieces joined; those of type `Marker` are its markers."""
        parts, markers, at = [], [], 0
        for piece in pieces:
            if isinstance(piece, Marker):
                markers.append((at, at + len(piece)))
            parts.append(piece)
            at += len(piece)
        return cls("".join(parts), markers)

    def segments(self) -> Iterator[str]:
        """The text cut at its markers, which come as `Marker`; no piece is empty."""
        at = 0
        for start, end in (*self.markers, (len(self), len(self))):
            if plain := self[at:start]:
                yield plain
            if marker := self[start:end]:
                yield Marker(marker)
            at = end

    def __add__(self, other: str) -> PromptText:
        return PromptText(str.__add__(self, other), (*self.markers, *_moved(other, len(self))))

    def __radd__(self, other: str) -> PromptText:
        return PromptText(str.__add__(other, self), _moved(self, len(other)))


def _moved(text: str, offset: int) -> Iterator[Range]:
    if isinstance(text, PromptText):
        yield from ((start + offset, end + offset) for start, end in text.markers)
