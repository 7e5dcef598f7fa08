"""Whole layers through Ascend's operators: at the widths that chips take at least, and, in the long
tier, at those of Flash and Pro."""

import re

import pytest
from processes import HERE, long, run

from softnpu import SOCS

A2, A3, A5 = SOCS
CHIPS = {A2: "A2", A3: "A3", A5: "A5"}
LAUNCHES = HERE.parents[1] / "docs" / "launches.md"
FLIPPED_CODES = 2
"""A last bit of fp32 decides some int8 codes: so many times what two implementations on the CPU
differ by, a chip may differ by.
"""
NEAR_THE_CPU = {("least", "a2a3-int8")}
"""Release and profile. Codes and choices that tip add up over random layers: elsewhere the logits
say little, and the operators alone prove the step.
"""
OF_MOST_ROWS = 2e-2
"""Logits of most rows beside the CPU's: a code that tips moves a row by so much, a wrong cache by
its size.
"""
LAST_BITS = 2e-3
"""An operator beside its reference: so much of the size of a result are bf16 neighbours."""


@pytest.mark.parametrize(
    ("release", "profile", "soc", "queue"),
    [
        ("least", "a2a3-int8", A3, "1"),
        ("least", "a5-mx", A5, "1"),
        ("least", "bf16", A3, "1"),
        pytest.param("least", "bf16", A5, "1", marks=long),
        pytest.param("least", "a2a3-int8", A3, "0", marks=long),
        pytest.param("least", "a2a3-int8", A3, "2", marks=long),
        pytest.param("flash", "a2a3-int8", A3, "1", marks=long),
        pytest.param("pro", "a2a3-int8", A3, "1", marks=long),
        pytest.param("flash", "a5-mx", A5, "1", marks=long),
    ],
)
@pytest.mark.timeout(1000)
def test_a_decode_step_is_all_launches_and_is_captured(release, profile, soc, queue):
    variables = {"TASK_QUEUE_ENABLE": queue}
    code, output = run(
        "production.py", release, profile, soc=soc, cann="9.1.0", variables=variables, timeout=900
    )
    check_step(output, code, near_the_cpu=(release, profile) in NEAR_THE_CPU)
    assert counts(output) == documented(f"`{profile}`", soc), output


@pytest.mark.parametrize(
    ("profile", "queue"),
    [
        ("a2a3-int8", "1"),
        pytest.param("a2a3-int8", "0", marks=long),
        pytest.param("a2a3-int8", "2", marks=long),
        pytest.param("bf16", "1", marks=long),
    ],
)
@pytest.mark.timeout(1000)
def test_the_gate_of_vllm_ascend_saves_three_launches_of_a_layer(profile, queue):
    code, output = run(
        "production.py", "least", profile, soc=A3, cann="9.1.0", vendor="vllm-ascend",
        variables={"TASK_QUEUE_ENABLE": queue}, timeout=900,
    )  # fmt: skip
    check_step(output, code, near_the_cpu=("least", profile) in NEAR_THE_CPU)
    assert counts(output) == documented(f"`{profile}` with vllm-ascend's gate", A3), output
    assert " MoeGatingTopKHash" in output and "MoeGatingTopKV2" not in output, output


def test_where_the_chip_has_no_compressor_its_steps_are_captured_too():
    code, output = run("production.py", "least", "a2a3-int8", "csa", soc=A2, cann="9.1.0")
    check_step(output, code)


@pytest.mark.parametrize(
    ("profile", "soc", "queue", "kinds"),
    [
        ("a2a3-int8", A3, "1", ()),
        pytest.param("a2a3-int8", A3, "0", (), marks=long),
        pytest.param("bf16", A3, "1", (), marks=long),
        pytest.param("a2a3-int8", A2, "1", ("csa",), marks=long),
        pytest.param("a5-mx", A5, "1", ("csa",), marks=long),
    ],
)
def test_steps_with_drafts_are_captured_and_their_texts_are_the_cpu_s(profile, soc, queue, kinds):
    """With 1 and 3 drafts of which some are rejected; a replayed step is two graphs."""
    options = {"soc": soc, "cann": "9.1.0", "variables": {"TASK_QUEUE_ENABLE": queue}}
    code, output = run("drafts.py", profile, *kinds, timeout=580, **options)
    assert code == 0 and "ran a reference" not in output, output
    assert output.count(": as the CPU's True") == 6, output
    shares = re.findall(r"^[13] drafts, \w+: .* right (\S+) of", output, re.MULTILINE)
    assert len(shares) == 4 and all(0 < float(share) < 1 for share in shares), output
    assert output.count("captured equals eager True") == 2, output
    assert output.count("a replayed step has 0 launches and 0 allocations") == 2, output
    differences = re.findall(r"beside the CPU (\S+)", output)
    assert len(differences) == 2 and all(float(d) < OF_MOST_ROWS for d in differences), output


@long
def test_metadata_is_made_once_for_all_layers_of_a_kind():
    code, output = run("production.py", "least", "a2a3-int8", "hca", "hca", soc=A3, cann="9.1.0")
    assert code == 0, output
    (layer,) = (line for line in documented("`a2a3-int8`", A3) if " hca: " in line)
    alone = re.findall(r"once: (\d+)", "".join(documented("`a2a3-int8`", A3)))
    (once,) = re.findall(r"once: (\d+)", output)
    assert layer in output and int(once) == int(alone[0]) - 2, output


@pytest.mark.parametrize(
    ("profile", "soc", "every"),
    [
        ("a2a3-int8", A3, 4),
        pytest.param("a2a3-int8", A3, 1, marks=long),
        pytest.param("a5-mx", A5, 1, marks=long),
    ],
)
def test_every_failing_launch_of_a_decode_step_is_an_error_and_the_process_goes_on(
    profile, soc, every
):
    """All functions in the long tier, every fourth otherwise."""
    variables = {"TASK_QUEUE_ENABLE": "0"}
    code, output = run(
        "decode_faults.py", profile, every, soc=soc, cann="9.1.0", variables=variables, timeout=580
    )
    (functions,) = re.findall(r"^0 wrong of (\d+) functions", output, re.MULTILINE) or ("0",)
    assert code == 0 and 20 // every <= int(functions) < 30, output


@pytest.mark.parametrize(
    ("profile", "soc", "seeds"),
    [
        ("a2a3-int8", A3, 10),
        pytest.param("a2a3-int8", A3, 500, marks=long),
        pytest.param("a5-mx", A5, 500, marks=long),
    ],
)
@pytest.mark.timeout(2100)
def test_a_decode_step_has_the_same_bits_whatever_stream_is_late(profile, soc, seeds):
    options = {"soc": soc, "cann": "9.1.0", "timeout": 2000}
    code, output = run("decode_chaos.py", profile, str(seeds), **options)
    assert code == 0 and f"other bits with 0 of {seeds} seeds" in output, output


def check_step(output, code, near_the_cpu=False):
    """No reference ran, a captured step has the bits of an eager one, every operator is what its
    reference computes; and the logits are near the CPU's, where codes do not tip too often.
    """
    assert code == 0 and "ran a reference" not in output, output
    assert "captured equals eager: True" in output, output
    (operator,) = re.findall(r"worst operator beside its reference: (\S+)", output)
    assert float(operator) < LAST_BITS, output
    (difference,) = re.findall(r"beside the CPU: (\S+)", output)
    (noise,) = re.findall(r"the CPU's kernels beside its references: (\S+)", output)
    assert float(difference) < FLIPPED_CODES * float(noise) or not near_the_cpu, output


def counts(text):
    return re.findall(r"^launches of .*$", text, re.MULTILINE)


def documented(what, soc):
    """The lines of a block in the page: of a profile, with a package beside CANN's own operators or
    not, on a chip.
    """
    return counts(LAUNCHES.read_text().partition(f"\n{what} on {CHIPS[soc]} ")[2].split("```")[1])
