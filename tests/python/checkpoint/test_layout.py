"""The tensors a configuration implies: parameter counts,
shapes and scales of the releases (spec 1.4, section 7).
"""

import pytest
from tiny_checkpoints import UNQUANTISED, tiny_config

from dsv4_ascend.checkpoint.config import V4Config
from dsv4_ascend.checkpoint.layout import FLOAT, FP4, FP8, layout, parameter_count

COUNTS = {
    "flash": ("284.332", "277.025", "13.270", "5.086", "6.493", "6.610", "290.942"),
    "pro": ("1572.997", "1547.396", "48.852", "19.465", "24.178", "25.840", "1598.837"),
}
"""Spec 1.4, in billions: main, routed experts, active,
attention, routed per token, MTP, main + MTP.
"""


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_of_the_releases(name):
    config = getattr(V4Config, name)()
    entries = layout(config)
    main = {key: entry for key, entry in entries.items() if not key.startswith("mtp.")}
    total = parameter_count(main)
    experts = parameter_count({key: entry for key, entry in main.items() if ".ffn.experts." in key})
    attention = parameter_count({key: entry for key, entry in main.items() if ".attn." in key})
    routed = experts * config.num_experts_per_tok // config.n_routed_experts
    active = total - parameter_count({"embed": main["embed.weight"]}) - experts + routed
    everything = parameter_count(entries)
    counts = (total, experts, active, attention, routed, everything - total, everything)
    assert tuple(f"{count / 1e9:.3f}" for count in counts) == COUNTS[name]


def test_checkpoint_bytes_of_pro():
    size = {"BF16": 2, "F32": 4, "I64": 8, FP8: 1, "I8": 1}
    total = 0
    for name, entry in layout(V4Config.pro()).items():
        fp32 = "hc_" in name or name.endswith((".ape", ".attn_sink", ".bias"))
        dtype = (
            "F32"
            if fp32
            else "BF16"
            if entry.dtypes == FLOAT and not entry.scale_name
            else entry.dtypes[0]
        )
        for shape, width in (
            (entry.stored_shape(dtype), size[dtype]),
            (entry.scale_shape(dtype) or (0,), 1),
        ):
            count = width
            for extent in shape:
                count *= extent
            total += count
    assert f"{total / 1e9:.2f}" == "864.70"


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "scale"),
    [
        ("layers.0.attn.wq_a.weight", FP8, (1024, 4096), (8, 32)),
        ("layers.0.attn.wo_a.weight", FP8, (8192, 4096), (64, 32)),
        ("layers.0.attn.wo_b.weight", FP8, (4096, 8192), (32, 64)),
        ("layers.2.attn.indexer.wq_b.weight", FP8, (8192, 1024), (64, 8)),
        ("layers.3.ffn.experts.255.w1.weight", "I8", (2048, 2048), (2048, 128)),
        ("layers.3.ffn.experts.255.w2.weight", "I8", (4096, 1024), (4096, 64)),
        ("layers.3.ffn.experts.0.w2.weight", "F4", (4096, 2048), (4096, 64)),
        ("layers.3.ffn.shared_experts.w2.weight", FP8, (4096, 2048), (32, 16)),
        ("mtp.0.e_proj.weight", FP8, (4096, 4096), (32, 32)),
        ("layers.2.attn.compressor.ape", "F32", (4, 1024), None),
        ("layers.3.attn.compressor.ape", "F32", (128, 512), None),
        ("layers.2.attn.indexer.compressor.ape", "F32", (4, 256), None),
        ("layers.0.hc_attn_fn", "F32", (24, 16384), None),
        ("hc_head_fn", "F32", (4, 16384), None),
        ("layers.2.ffn.gate.tid2eid", "I64", (129280, 6), None),
    ],
)
def test_shapes_of_flash(name, dtype, shape, scale):
    entry = layout(V4Config.flash())[name]
    assert dtype in entry.dtypes
    assert entry.stored_shape(dtype) == shape
    assert entry.scale_shape(dtype) == scale


def test_which_tensors_a_layer_has():
    names = set(layout(tiny_config()))
    assert {"layers.0.ffn.gate.tid2eid", "layers.1.ffn.gate.bias", "mtp.0.ffn.gate.bias"} <= names
    assert (
        not {"layers.0.ffn.gate.bias", "layers.0.attn.compressor.ape", "mtp.0.attn.compressor.ape"}
        & names
    )
    assert "layers.1.attn.indexer.wq_b.weight" in names
    assert "layers.2.attn.indexer.wq_b.weight" not in names


def test_floats_are_allowed_wherever_quantised_weights_are():
    for entry in layout(V4Config.flash()).values():
        assert entry.scale_name is None or set(FLOAT) < set(entry.dtypes)
    for entry in layout(UNQUANTISED).values():
        assert not {FP8, *FP4} & set(entry.dtypes)
