"""What of transformers we plug into: whether it is there, and the names we register."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from pathlib import Path

from dsv4_backend.errors import EnvironmentFault

NAME = "dsv4"
"""Of our attention function and of our experts."""
SPARSE = "dsv4_sparse"
"""Of what models built inside `sparse()` run; their masks are bands."""
TESTED = "5.23.0"
"""The version that everything here was run with."""
MODEL = "transformers.models.deepseek_v4.modeling_deepseek_v4"
ATTENTION = "DeepseekV4Attention"
_NEEDED = {
    "transformers": ("AttentionInterface", "AttentionMaskInterface"),
    "transformers.integrations.moe": ("ExpertsInterface",),
    "transformers.masking_utils": ("eager_mask", "prepare_padding_mask", "padding_mask_function"),
    "transformers.monkey_patching": ("register_patch_mapping", "unregister_patch_mapping"),
    MODEL: (ATTENTION, "DeepseekV4PreTrainedModel", "apply_rotary_pos_emb"),
}
"""Module -> what we use of it."""


def version() -> str | None:
    """The version of transformers that is installed, if one is."""
    try:
        return importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return None


def missing() -> list[str]:
    """What we use of transformers and this one does not have; imports its modules."""
    absent = []
    for name, attributes in _NEEDED.items():
        try:
            module = importlib.import_module(name)
        except ImportError:
            absent.append(name)
            continue
        absent += [f"{name}.{one}" for one in attributes if not hasattr(module, one)]
    return absent


def found() -> tuple[str | None, list[str]]:
    """(version, modules that are missing), by the files alone: nothing is imported."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return None, []
    root = Path(spec.submodule_search_locations[0]).parent
    paths = {name: root.joinpath(*name.split(".")) for name in _NEEDED}
    there = (path.is_dir() or path.with_suffix(".py").is_file() for path in paths.values())
    return version(), [name for name, exists in zip(paths, there, strict=True) if not exists]


def check() -> None:
    """EnvironmentFault where transformers is missing, or lacks what we use of it."""
    installed, advice = version(), f"pip install transformers=={TESTED}"
    if installed is None:
        raise EnvironmentFault(f"transformers is not installed: {advice}")
    absent = missing()
    if absent:
        raise EnvironmentFault(
            f"transformers {installed} has no {', '.join(absent)}; tested with {TESTED}: {advice}"
        )
