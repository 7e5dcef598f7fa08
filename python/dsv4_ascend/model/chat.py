"""`dsv4_ascend.chat.encoding` under the name that scripts written before it moved import."""

from dsv4_ascend.chat.encoding import ChatMode, encode_messages

__all__ = ["ChatMode", "encode_messages"]
