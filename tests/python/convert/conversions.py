"""Small sources, and what a finished folder is."""

from pathlib import Path

from tiny_checkpoints import tiny_config, write_tiny

from dsv4_ascend.convert.job import convert
from dsv4_ascend.convert.targets import TARGETS

DEPLOYED = ("a2a3-int8", "a2a3-w4a8", "a5-mx")
SIZES = {"hidden_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 3}


def write_source(folder: Path, shard_bytes: int = 30_000, **dtypes) -> Path:
    """An official folder of random weights in several shards, with a file beside them."""
    write_tiny(folder, tiny_config(**SIZES), shard_bytes, **dtypes)
    (folder / "generation_config.json").write_text("{}\n")
    (folder / "encoding").mkdir()
    (folder / "encoding" / "encoding_dsv4.py").write_text("BOS = 'x'\n")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def converted(source: Path, folder: Path, target: str) -> Path:
    """The folder, finished."""
    convert(source, folder, TARGETS[target])
    return folder
