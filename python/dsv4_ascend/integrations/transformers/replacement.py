"""One class of transformers replaced for a while, through its own hook, and put back whole."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling
from transformers.monkey_patching import (
    get_patch_mapping,
    register_patch_mapping,
    unregister_patch_mapping,
)

from dsv4_ascend.integrations.transformers.seams import ATTENTION
from dsv4_backend.errors import EnvironmentFault


@contextmanager
def replaced(ours: type[nn.Module]) -> Iterator[None]:
    """Inside, models are built with `ours` for DeepseekV4Attention.

    transformers leaves two things behind, which are undone here: the class that records attentions
    is changed for all models to come, and where building a model fails the class stays replaced.
    EnvironmentFault where the class has a replacement already.
    """
    other = get_patch_mapping().get(ATTENTION)
    if other is not None:
        raise EnvironmentFault(
            f"transformers' {ATTENTION} is replaced by {other.__module__}.{other.__qualname__} "
            "already: leave that sparse(), or unregister_patch_mapping, first"
        )
    theirs = getattr(modeling, ATTENTION)
    recorders = modeling.DeepseekV4PreTrainedModel._can_record_outputs
    before = dict(recorders)
    register_patch_mapping({ATTENTION: ours})
    try:
        yield
    finally:
        unregister_patch_mapping([ATTENTION])
        recorders.update(before)
        for name, module in list(sys.modules.items()):
            if name.startswith("transformers") and vars(module).get(ATTENTION) is ours:
                setattr(module, ATTENTION, theirs)
