"""`dsv4_ascend.checkpoint.layout` under the name that scripts written before it moved import."""

from dsv4_ascend.checkpoint.layout import Layout, layout

__all__ = ["Layout", "layout"]
