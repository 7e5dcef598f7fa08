"""What errors say of values that do not fit together, where they may be read."""

import pytest
import torch
from relation_calls import check, ints, longs, ones, spaced

from dsv4_backend import dispatch
from dsv4_backend.errors import ArgumentError

# Operator, changed arguments; argument that the error names, found, expected.
# fmt: off
WRONG = [
    ("sparse_attention", {"query_start_loc": ints(0, 2, 2)},
     "query_start_loc", "0 .. 2", "offsets from 0 to the number of tokens 3"),
    ("sparse_attention", {"query_start_loc": spaced(ints(1, 2, 3))},
     "query_start_loc", "1 .. 3", "offsets from 0 to the number of tokens 3"),
    ("sparse_attention", {"query_start_loc": ints(0, 4, 3)},
     "query_start_loc", "4 then 3 at 1", "offsets that never fall"),
    ("sparse_attention", {"query_start_loc": ints(0, -1, 3)},
     "query_start_loc", "0 then -1 at 0", "offsets that never fall"),
    ("sparse_attention", {"seq_lens": ints(1, 3)},
     "seq_lens", "1 at 0", "at least the 2 tokens of this call"),
    ("sparse_attention", {"seq_lens": spaced(ints(4, -5))},
     "seq_lens", "-5 at 1", "at least the 1 tokens of this call"),
    ("sparse_attention", {"window_block_table": ints([0], [2])},
     "window_block_table", "1 columns of 2 rows",
     "at least 4, to hold indices 0 to 3 of sequence 0"),
    ("sparse_attention", {"window_block_table": ints([0, 4], [2, 3])},
     "window_block_table", "4 at [0, 1]", "0 to 3"),
    ("sparse_attention", {"window_block_table": spaced(ints([0, 1], [-1, 3]))},
     "window_block_table", "-1 at [1, 0]", "0 to 3"),
    ("sparse_attention", {"seq_lens": ints(4, 2147483647), "window": 2147483647},
     "window_block_table", "2 columns of 2 rows",
     "at least 2147483647, to hold indices 0 to 2147483646 of sequence 1"),
    ("sparse_attention", {"cmp_block_table": ints([3, 9], [1, 9])},
     "cmp_block_table", "3 at [0, 0]", "0 to 2"),
    ("sparse_attention", {"cmp_block_table": ints([2, 9], [-1, 9])},
     "cmp_block_table", "-1 at [1, 0]", "0 to 2"),
    ("sparse_attention", {"seq_lens": ints(4, 99)},
     "cmp_block_table", "2 columns of 2 rows",
     "at least 49, to hold indices 0 to 48 of sequence 1"),
    ("sparse_attention", {"cmp_indices": ints([0, -1], [2, 0], [0, -1])},
     "cmp_indices", "2 at [1, 0]", "-1 or one of the 2 visible entries"),
    ("sparse_attention", {"cmp_indices": spaced(ints([0, -1], [1, 0], [0, -2]))},
     "cmp_indices", "-2 at [2, 1]", "-1 or one of the 1 visible entries"),
    ("sparse_attention", {"cmp_indices": ints([1, -1], [1, 0], [0, -1])},
     "cmp_indices", "1 at [0, 0]", "-1 or one of the 1 visible entries"),
    ("sparse_attention_p512", {"max_seq_len": 3},
     "max_seq_len", "3", "at least 4, as in seq_lens"),
    ("sparse_attention_p512", {"sink": torch.tensor([0.0, torch.nan])},
     "sink", "nan of head 1", "finite values"),
    ("sparse_attention_p512", {"sink": torch.tensor([-torch.inf, 0.0])},
     "sink", "-inf of head 0", "finite values"),
    ("sparse_attention_p512", {"sink": spaced(torch.tensor([0.0, torch.inf]))},
     "sink", "inf of head 1", "finite values"),
    ("sparse_attention_p512", {"cmp_indices": ints([0, -1], [-1, 0], [0, -1])},
     "cmp_indices", "-1 at [1, 0] before an entry", "-1 behind all entries of a row"),
    ("sparse_attention_p512", {"cmp_indices": spaced(ints([-1, -1], [1, 0], [-1, 0]))},
     "cmp_indices", "-1 at [2, 0] before an entry", "-1 behind all entries of a row"),
    ("sparse_attention_p512", {"cmp_indices": ints([-1, 0], [1, 0], [0, -1])},
     "cmp_indices", "-1 at [0, 0] before an entry", "-1 behind all entries of a row"),
    ("compress", {"query_start_loc": ints(0, 3, 3), "x": ones(2, 6)},
     "query_start_loc", "0 .. 3", "offsets from 0 to the number of tokens 2"),
    ("compress", {"seq_lens": ints(4, 0)},
     "seq_lens", "0 at 1", "at least the 1 tokens of this call"),
    ("compress", {"state_block_table": ints([0, 2], [3, 4])},
     "state_block_table", "0 at [0, 0]", "1 to 4"),
    ("compress", {"state_block_table": ints([1, 2], [3, 5])},
     "state_block_table", "5 at [1, 1]", "1 to 4"),
    ("compress", {"state_block_table": ints([1], [3])},
     "state_block_table", "1 columns of 2 rows",
     "at least 4, to hold indices 0 to 3 of sequence 0"),
    ("compress", {"max_seq_len": 3},
     "max_seq_len", "3", "at least 4, as in seq_lens"),
    ("compress", {"seq_lens": ints(4, 5), "max_seq_len": 0},
     "max_seq_len", "0", "at least 5, as in seq_lens"),
    ("compress", {"state_block_table": ints([1, 2], [3, 2])},
     "state_block_table", "cache row 4 written twice", "distinct rows"),
    ("compress", {"state_block_table": spaced(ints([1, 3], [4, 3]))},
     "state_block_table", "cache row 6 written twice", "distinct rows"),
    ("compress", {"state_block_table": ints([2, 4], [1, 4])},
     "state_block_table", "cache row 8 written twice", "distinct rows"),
    ("indexer_scores", {"query_start_loc": ints(0, 2, 4)},
     "query_start_loc", "0 .. 4", "offsets from 0 to the number of tokens 3"),
    ("indexer_scores", {"block_table": ints([3, 9], [1, 9])},
     "block_table", "3 at [0, 0]", "0 to 2"),
    ("indexer_topk", {"block_table": ints([3, 9], [1, 9])},
     "block_table", "3 at [0, 0]", "0 to 2"),
    ("lightning_indexer", {"max_seq_len": 2},
     "max_seq_len", "2", "at least 4, as in seq_lens"),
    ("lightning_indexer", {"block_table": ints([2, 9], [-7, 9])},
     "block_table", "-7 at [1, 0]", "0 to 2"),
    ("lightning_indexer_fp8", {"seq_lens": ints(4, 9)},
     "max_seq_len", "8", "at least 9, as in seq_lens"),
    ("lightning_indexer_fp8", {"seq_lens": ints(0, 3)},
     "seq_lens", "0 at 0", "at least the 2 tokens of this call"),
    ("topk_indices", {"visible": ints(0, 5, 2)},
     "visible", "5 at 1", "0 to 4, the scores of a row"),
    ("topk_indices", {"visible": longs(0, 4, -1)},
     "visible", "-1 at 2", "0 to 4, the scores of a row"),
    ("topk_indices", {"visible": spaced(ints(-9, 4, 2))},
     "visible", "-9 at 0", "0 to 4, the scores of a row"),
    ("topk_indices", {"visible": longs(0, 4, 1 << 62)},
     "visible", "4611686018427387904 at 2", "0 to 4, the scores of a row"),
    ("topk_indices", {"scores": torch.tensor([[torch.nan] * 4, [1, 2, 3, torch.nan], [1, 2, 3,
     4]])},
     "scores", "NaN at [1, 3]", "numbers or infinities where visible"),
    ("topk_indices", {"scores": spaced(torch.tensor([[1.0, 2, 3, 4], [1, 2, 3, 4], [torch.nan, 2,
     3, 4]]))},
     "scores", "NaN at [2, 0]", "numbers or infinities where visible"),
    ("topk_indices", {"scores": torch.tensor([[1.0, 2, 3, 4], [torch.nan, torch.nan, 3, 4], [1, 2,
     3, 4]]).bfloat16()},
     "scores", "NaN at [1, 0]", "numbers or infinities where visible"),
    ("write_cache", {"slots": longs(4, -1, 0)},
     "slots", "4 at 0", "-1 or a slot in [0, 4)"),
    ("write_cache", {"slots": longs(2, -2, 0)},
     "slots", "-2 at 1", "-1 or a slot in [0, 4)"),
    ("write_cache", {"slots": spaced(longs(2, 0, 1 << 62))},
     "slots", "4611686018427387904 at 2", "-1 or a slot in [0, 4)"),
    ("write_cache", {"slots": longs(2, -1, 2)},
     "slots", "2 more than once", "every slot once"),
    ("write_cache", {"slots": spaced(longs(3, 1, 1))},
     "slots", "1 more than once", "every slot once"),
    ("write_cache", {"slots": longs(0, 0, 0)},
     "slots", "0 more than once", "every slot once"),
    ("write_cache_fp8_ds_mla", {"slots": longs(2, 4, 0)},
     "slots", "4 at 1", "-1 or a slot in [0, 4)"),
    ("write_cache_fp8_ds_mla", {"slots": longs(2, 3, 2)},
     "slots", "2 more than once", "every slot once"),
    ("read_cache_fp8_ds_mla", {"slots": longs(2, 2, 4)},
     "slots", "4 at 2", "-1 or a slot in [0, 4)"),
    ("read_cache_indexer_int8", {"slots": longs(-2, 2, 2)},
     "slots", "-2 at 0", "-1 or a slot in [0, 4)"),
    ("moe_combine", {"order": ints(3, 0, 2, 2)},
     "order", "2 more than once", "a permutation of 0..3"),
    ("moe_combine", {"order": spaced(longs(1, 0, 1, 0))},
     "order", "0 more than once", "a permutation of 0..3"),
    ("moe_combine", {"order": ints(3, 3, 3, 3)},
     "order", "3 more than once", "a permutation of 0..3"),
    ("gate_hash", {"tid2eid": ints([0, 4], [-7, 99], [1, 1])},
     "tid2eid", "4 at [0, 1]", "values in [0, 4)"),
    ("gate_hash", {"tid2eid": spaced(longs([0, 3], [-7, 99], [-1, 1]))},
     "tid2eid", "-1 at [2, 0]", "values in [0, 4)"),
    ("gate_hash", {"input_ids": ints(1, 0)},
     "tid2eid", "-7 at [1, 0]", "values in [0, 4)"),
    ("sample", {"logits": torch.tensor([[0.0, 1, 2], [0, torch.nan, torch.inf]])},
     "logits", "largest logit nan in row 1", "no NaN, no +inf and a finite logit in every row"),
    ("sample", {"logits": spaced(torch.tensor([[0.0, 1, torch.inf], [0, 1, 2]]))},
     "logits", "largest logit inf in row 0", "no NaN, no +inf and a finite logit in every row"),
    ("sample", {"logits": torch.tensor([[0.0, 1, 2], [-torch.inf] * 3]).double(), "noise": ones(2,
     3).double()},
     "logits", "largest logit -inf in row 1", "no NaN, no +inf and a finite logit in every row"),
    ("sample", {"noise": torch.tensor([[1.0, 1, 0], [1, 1, 1]])},
     "noise", "0.0 at [0, 2]", "values > 0"),
    ("sample", {"noise": spaced(torch.tensor([[1.0, 1, 1], [-1e-05, 1, 1]]))},
     "noise", "-9.999999747378752e-06 at [1, 0]", "values > 0"),
    ("sample", {"noise": torch.tensor([[1.0, 1, 1], [1, torch.nan, 1]])},
     "noise", "nan at [1, 1]", "values > 0"),
    ("grouped_gemm", {"expert_offsets": ints(0, 1, 2)},
     "expert_offsets", "[0, 1, 2]", "offsets from 0 to the number of rows 3, never falling"),
    ("grouped_gemm", {"expert_offsets": ints(1, 1, 3)},
     "expert_offsets", "[1, 1, 3]", "offsets from 0 to the number of rows 3, never falling"),
    ("grouped_gemm", {"expert_offsets": spaced(ints(0, 4, 3))},
     "expert_offsets", "[0, 4, 3]", "offsets from 0 to the number of rows 3, never falling"),
    ("grouped_gemm", {"expert_offsets": ints(0, -1, 3)},
     "expert_offsets", "[0, -1, 3]", "offsets from 0 to the number of rows 3, never falling"),
    ("int8_grouped_gemm", {"weight_scale": torch.full((2, 4), 0.1)},
     "weight_scale", "0.10000000149011612", "values that bf16 holds"),
    ("int8_grouped_gemm", {"weight_scale": spaced(torch.tensor([[1.0, 2, torch.nan, 4], [1, 1e+16,
     torch.inf, 1]]))},
     "weight_scale", "1.0000000272564224e+16", "values that bf16 holds"),
    ("int8_grouped_gemm", {"weight_scale": torch.full((2, 4), 1 + 2 ** (-20), dtype=torch.float64)},
     "weight_scale", "1.0000009536743164", "values that bf16 holds"),
    ("int8_swiglu_quant", {"expert_offsets": ints(0, 0, 2)},
     "expert_offsets", "[0, 0, 2]", "offsets from 0 to the number of rows 3, never falling"),
]
# fmt: on


@pytest.mark.parametrize(("name", "changed", "argument", "found", "expected"), WRONG)
def test_values_that_do_not_fit(name, changed, argument, found, expected):
    with pytest.raises(ArgumentError) as error:
        check(name, **changed)
    words = f"dsv4::{name}: argument '{argument}': found {found}, expected {expected}"
    assert str(error.value) == words


@pytest.mark.parametrize(("name", "changed"), [row[:2] for row in WRONG])
def test_values_are_not_read_unchecked(name, changed):
    with dispatch.use(check_contents=False):
        check(name, **changed)


# Operator, changed arguments: what looks odd and is right.
# fmt: off
RIGHT = [
    ("sparse_attention", {}),
    ("sparse_attention", {"seq_lens": ints(4, 3).expand(2)}),
    ("sparse_attention", {"window_block_table": ints([0, 1, 99], [2, 3, -99])}),
    ("sparse_attention", {"cmp_block_table": spaced(ints([2, -1], [1, 1 << 30]))}),
    ("sparse_attention", {"query_start_loc": ints(0, 3, 3), "cmp_block_table": ints([2], [-5]),
                          "cmp_indices": None}),
    ("sparse_attention", {"cmp_indices": ints([], [], [])}),
    ("sparse_attention", {"cmp_indices": None}),
    ("sparse_attention", {"seq_lens": ints(100, 3), "ratio": 50,
                          "cmp_indices": ints([-1], [0], [-1])}),
    ("sparse_attention_p512", {"cmp_indices": ints([-1, -1], [1, -1], [0, -1])}),
    ("compress", {"state_block_table": ints([1, 2, 0], [3, 4, 0])}),
    ("compress", {"query_start_loc": ints(0, 3, 3), "seq_lens": ints(4, 99), "max_seq_len": 99,
                  "state_block_table": ints([1, 2], [0, 0])}),
    ("topk_indices", {"scores": torch.full((3, 4), torch.nan), "visible": longs(0, 0, 0)}),
    ("topk_indices", {"scores": ones(3, 0), "visible": ints(0, 0, 0)}),
    ("write_cache", {"slots": longs(-1, -1, -1)}),
    ("write_cache", {"rows": ones(0, 3), "slots": longs()}),
    ("write_cache", {"slots": longs(3, 0, 2)}),
    ("read_cache_a5", {"slots": longs(2, 2, 2)}),
    ("moe_combine", {"y": ones(0, 2), "order": ints()}),
    ("gate_hash", {"x": ones(0, 3), "input_ids": longs()}),
    ("sample", {"noise": torch.zeros(2, 3), "temperature": 0.0}),
    ("sample", {"logits": ones(0, 3), "noise": ones(0, 3)}),
    ("sample", {"logits": torch.tensor([[-torch.inf, 3.4e38, 0], [-torch.inf, -torch.inf, 0]])}),
    ("grouped_gemm", {"expert_offsets": ints(0, 0, 3)}),
    ("grouped_gemm", {"x": ones(0, 5), "expert_offsets": ints(0, 0, 0)}),
    ("int8_grouped_gemm", {"weight_scale": torch.full((2, 4), torch.nan)}),
]
# fmt: on


@pytest.mark.parametrize(("name", "changed"), RIGHT)
def test_values_that_fit(name, changed):
    check(name, **changed)


def test_no_sequences():
    nothing = {"query_start_loc": ints(0), "seq_lens": ints()}
    tables = ("window_block_table", "cmp_block_table")
    empty = {name: ints([0]).expand(0, 2) for name in tables}
    check("sparse_attention", q=ones(0, 2, 4), cmp_indices=ints([0])[:0], **nothing, **empty)
    with pytest.raises(ArgumentError, match=r"0 \.\. 0, expected offsets from 0 to the number of"):
        check("sparse_attention", **nothing, **empty)


def test_a_wide_row_of_logits_is_read_to_its_end():
    for place in (0, 63, 64, 129, 130):
        logits = torch.zeros(2, 131)
        logits[1, place] = torch.nan
        with pytest.raises(ArgumentError, match="largest logit nan in row 1"):
            check("sample", logits=logits, noise=ones(2, 131))
        with pytest.raises(ArgumentError, match=rf"0.0 at \[1, {place}\], expected values > 0"):
            check("sample", logits=ones(2, 131), noise=logits.isfinite().float())
