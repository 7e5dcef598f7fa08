"""`dsv4_ascend.checkpoint.config` under the name that scripts written before it moved import."""

from dsv4_ascend.checkpoint.config import V4Config

__all__ = ["V4Config"]
