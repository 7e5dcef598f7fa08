"""The layouts of docs/clusters.md say what the planner says."""

import itertools
from pathlib import Path

import pytest
from planned import planned

PAGE = Path(__file__).parents[3] / "docs" / "clusters.md"
ROWS = [
    [cell.strip() for cell in line.strip("|\n").split("|")]
    for line in PAGE.read_text().splitlines()
    if line.startswith(("| flash |", "| pro |"))
]


@pytest.mark.parametrize("row", ROWS, ids=" ".join)
def test_a_layout_is_as_planned(row):
    model, device, count, precision, layout, weights, requests = row
    device, _, memory = device.partition(" --memory ")
    found = planned(
        model=model, device=device, count=int(count), context=131_072, precision=precision,
        layout=layout, memory=float(memory) if memory else None,
    ).chosen.memory  # fmt: skip
    assert f"{(found.weights + found.draft) / 1e9:.1f}" == weights
    assert f"{found.requests_per_group} ({found.requests})" == requests


def test_every_chip_has_a_layout_of_both_models():
    chips = {"910B3": "A2", "910C": "A3", "950DT": "A5", "950PR": "A5"}
    named = {(model, chips[device.split()[0]]) for model, device, *_ in ROWS}
    assert named == set(itertools.product(("flash", "pro"), ("A2", "A3", "A5")))
