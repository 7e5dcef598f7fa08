"""`dsv4_ascend.checkpoint.save` under the name that scripts written before it moved import."""

from dsv4_ascend.checkpoint.save import save_checkpoint

__all__ = ["save_checkpoint"]
