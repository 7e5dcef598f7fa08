"""One module per operator family; importing this package declares every contract."""

from dsv4_backend.ops import (
    attention,
    cache,
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
