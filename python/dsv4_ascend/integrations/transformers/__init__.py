"""DeepSeek V4 of Hugging Face transformers on our operators (docs/transformers.md).

Importing this changes nothing, and does not import transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dsv4_ascend.integrations.transformers.seams import NAME, SPARSE, check

__all__ = ["NAME", "SPARSE", "register", "sparse"]


def register() -> None:
    """Make "dsv4" known to transformers, as a name of attention and one of experts.

    Afterwards `model.set_attn_implementation("dsv4")` and
    `model.set_experts_implementation("dsv4")` choose them, or the arguments of those names in
    `from_pretrained`; other models are as before.
    EnvironmentFault without transformers, or where it lacks what we need.
    """
    check()
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.moe import ExpertsInterface
    from transformers.masking_utils import eager_mask

    from dsv4_ascend.integrations.transformers import attention, experts, masks

    AttentionInterface.register(NAME, attention.attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    AttentionInterface.register(SPARSE, attention.not_sparse)
    AttentionMaskInterface.register(SPARSE, masks.band)
    ExpertsInterface.register(NAME, experts.forward)


@contextmanager
def sparse() -> Iterator[None]:
    """`from_pretrained` and `from_config` inside build V4 models whose attention has sparse cost.

    The class DeepseekV4Attention is replaced through transformers' `register_patch_mapping`, which
    is global: other threads should build no models meanwhile. Afterwards it is as it was, also
    after an error; models built inside stay sparse. Names and shapes of parameters are unchanged.
    `from_config` keeps the configuration object that it is given: give each model its own.
    EnvironmentFault without transformers, where it lacks what we need, or where the class is
    replaced already.
    """
    register()
    from dsv4_ascend.integrations.transformers import replacement, sparse_attention

    with replacement.replaced(sparse_attention.SparseAttention):
        yield
