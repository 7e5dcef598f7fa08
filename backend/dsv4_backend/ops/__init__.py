"""One module per operator family; importing this package declares every contract."""

from dsv4_backend.ops import (
    attention,
    cache,
    cache_bytes,
    compressor,
    embedding,
    gate,
    gemm,
    hadamard,
    hyper,
    indexer,
    moe,
    mtp,
    norm,
    quant,
    rope,
    sampling,
)

__all__ = [
    "attention",
    "cache",
    "cache_bytes",
    "compressor",
    "embedding",
    "gate",
    "gemm",
    "hadamard",
    "hyper",
    "indexer",
    "moe",
    "mtp",
    "norm",
    "quant",
    "rope",
    "sampling",
]
