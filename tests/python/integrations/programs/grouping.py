"""What vLLM's own grouping makes of our cache parts, by model and profile, as JSON."""

import json
import math
import sys
from types import SimpleNamespace

from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_layout import KVCacheLayout

from dsv4_ascend.checkpoint.config import V4Config
from dsv4_ascend.integrations.serving import cache_parts, entry_block_bytes
from dsv4_ascend.integrations.vllm.caches import PartBackend
from dsv4_ascend.integrations.vllm.specs import spec_of
from dsv4_ascend.model.profile import PROFILES


def grouped(config, profile):
    """Bytes of a block, used and needed, and at which multiples prefixes are found."""
    layout = PartBackend.supported_kv_cache_layouts()[0]
    vllm_config = SimpleNamespace(
        cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: KVCacheLayout(layout)),
        speculative_config=None,
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
    )
    parts = cache_parts(config, profile)
    specs = {part.key: spec_of(part) for part in parts}
    groups = kv_cache_utils._get_packed_kv_cache_groups(vllm_config, specs)
    pages = [sum(specs[name].page_size_bytes for name in group.layer_names) for group in groups]
    blocks = [group.kv_cache_spec.block_size for group in groups]
    return {
        "used": max(pages),
        "needed": entry_block_bytes(parts),
        "entry_groups": blocks.count(256),
        "layers": sum(len(group.layer_names) for group in groups),
        "parts": len(parts),
        "hits": math.lcm(*blocks),
    }


if __name__ == "__main__":
    names = json.loads(sys.argv[1])
    models = {"flash": V4Config.flash(), "pro": V4Config.pro()}
    found = {m: {n: grouped(c, PROFILES[n]) for n in names} for m, c in models.items()}
    print(f"\nANSWER {json.dumps(found)}")
