"""Equivalent mutants of bounds that operators share: they guard what no value reaches."""

_NEVER_BEYOND = "the scale is so large that no ratio lies beyond the largest code"
_ONE_BLOCK = "a row that is shorter is one block, and what it is padded with changes no code"

E4M3_RATIOS = {
    "round_e4m3: E4M3_MAX -> E4M3_MAX * 2": _NEVER_BEYOND,
    "round_e4m3: E4M3_MAX -> E4M3_MAX * 2 (2)": _NEVER_BEYOND,
}
INT8_RATIOS = {
    "round_int8: INT8_MAX -> INT8_MAX * 2": _NEVER_BEYOND,
    "round_int8: INT8_MAX -> INT8_MAX * 2 (2)": _NEVER_BEYOND,
}
SHORT_ROWS = {"split_blocks: min(block_size, max(x.shape[-1], 1)) -> block_size": _ONE_BLOCK}
NO_ROWS_OF_NOTHING = {
    "split_blocks: max(x.shape[-1], 1) -> x.shape[-1]": "its rows have channels, a relation says"
}
BOTH_OR_NEITHER = "both are given or neither, which a relation of the contract checks"
PAIRS = {
    "compressed_keys: cache is None or block_table is None -> "
    "cache is None and block_table is None": BOTH_OR_NEITHER
}
"""Of every attention: arguments that come together."""
