"""`dsv4_ascend.chat.tokenizer` under the name that scripts written before it moved import."""

from dsv4_ascend.chat.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
