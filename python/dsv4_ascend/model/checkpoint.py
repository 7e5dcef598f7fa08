"""`dsv4_ascend.checkpoint.folder` under the name that scripts written before it moved import."""

from dsv4_ascend.checkpoint.folder import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
