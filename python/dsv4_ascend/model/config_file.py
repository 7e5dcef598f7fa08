"""`dsv4_ascend.checkpoint.config_file` under the name
that scripts written before it moved import.
"""

from dsv4_ascend.checkpoint.config_file import config_to_dict

__all__ = ["config_to_dict"]
