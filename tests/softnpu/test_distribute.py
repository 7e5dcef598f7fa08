"""MC2: rows that go to the experts of other ranks and come back, over communicators of hccl."""

import pytest
from processes import long, run

from softnpu import SOCS


@pytest.mark.parametrize(
    ("ranks", "soc", "more"),
    [
        (2, SOCS[2], ["all"]),
        *(
            pytest.param(ranks, soc, more, marks=long)
            for ranks, soc, more in (
                (2, SOCS[0], ["all"]),
                (2, SOCS[1], ["all"]),
                (4, SOCS[0], []),
                (4, SOCS[1], []),
                (4, SOCS[2], []),
            )
        ),
    ],
)
def test_dispatch_and_combine(ranks, soc, more):
    code, output = run("distribute.py", *more, ranks=ranks, soc=soc)
    assert code == 0 and output.count(", 0 problems") == ranks, output


REASONS = {
    "experts": "ranks disagree on moeExpertNum: rank 0 says",
    "global_bs": "ranks disagree on globalBS",
    "buffer": "ranks disagree on HCCL_BUFFSIZE",
    "quant": "ranks disagree on quantMode",
    "call": "ranks disagree on the call",
    "uneven_mask": "argument 'xActiveMask': found tokens without communication",
    "mask_order": "argument 'xActiveMask': found true behind false",
    "id": "argument 'expertIds': found the value 4, expected 0 to 3",
    "twice": "a token names an expert twice",
    "dispatch_fault": "failed on rank 0: softnpu: injected fault",
    "combine_fault": "failed on rank 0: softnpu: injected fault",
    "version": "found version 4, expected 2",
    "mask": "argument 'xActiveMask': found other tokens than those of the dispatch",
    "ids": "argument 'expertIds': found other experts than those of the dispatch",
    "counts": "argument 'epSendCounts': found counts of another dispatch",
    "batch": "argument 'assistInfoForCombine': found globalBS 12, expected 10",
}


@pytest.mark.parametrize("case", [pytest.param(case, marks=long) for case in REASONS])
def test_ranks_that_disagree_all_learn_it(case):
    code, output = run("distribute_disagree.py", case, ranks=2, soc=SOCS[1])
    assert code == 0 and "NOT NOTICED" not in output and REASONS[case] in output, output
    assert output.count("learnt") == 4, output
