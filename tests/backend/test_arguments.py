"""Wrong, odd and hostile arguments: a right answer or a typed error, never a crash,
and nothing written on error.

pytest runs this file as a program, some families of operators at a time, so that a signal is a
failure that names the call: python tests/backend/test_arguments.py EXAMPLES LOG FAMILY...
"""

import collections
import faulthandler
import functools
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from dsv4_ascend.parity.compare import compare
from dsv4_ascend.parity.runner import Sample, map_tensors, mutated_arguments
from dsv4_backend import OPERATORS
from dsv4_backend.contract import Case
from dsv4_backend.errors import ArgumentError, Dsv4Error

EXAMPLES, MORE_EXAMPLES = 12, 500
PROGRAMS = 8
"""That share the families: most of a program's time is its start."""
SECONDS_PER_CALL = 60
MEMORY = 1 << 30
SMALL = 1 << 15
HUGE = 1 << 22

DTYPES = (
    *(
        torch.float32,
        torch.float64,
        torch.bfloat16,
        torch.float16,
        torch.float8_e4m3fn,
        torch.float8_e8m0fnu,
    ),
    *(torch.int32, torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64),
)
INTEGERS = (0, 1, -1, 2, 7, 2**31, -(2**31), 2**63 - 1, -(2**63))
FLOATS = (0.0, -0.0, -1.0, 1e-45, 1e38, 1e308, float("nan"), float("inf"), float("-inf"))
GARBAGE = (None, "text", 1.5, 7, [], (), [None], {}, b"\0")

FAMILIES = collections.defaultdict(list)
for _operator in OPERATORS.values():
    FAMILIES[_operator.reference.__module__.rpartition(".")[2]].append(_operator)

# torch's own words for: no such overload for these Python types; no memory; more elements than fit
# an index; a leaf that needs gradients, or a lazily negated view, given to be written.
TORCH_ERRORS = re.compile(
    r"^dsv4::\w+\(\)|Could not run 'dsv4::|can't allocate memory|not enough memory|"
    r"Storage size calculation overflowed|integer overflow|"
    r"a leaf Variable that requires grad|Expected Tensor but got None"
)


def other_rank(draw, t):
    return draw(
        st.sampled_from(
            (t.unsqueeze(0), t.unsqueeze(-1), t.flatten(), torch.zeros((), dtype=t.dtype))
        )
    )


def other_dtype(draw, t):
    return torch.zeros(t.shape, dtype=draw(st.sampled_from(DTYPES)))


def other_size(draw, t):
    if t.dim() == 0:
        return t
    dim = draw(st.integers(0, t.dim() - 1))
    return draw(
        st.sampled_from(
            (
                t.narrow(dim, 0, 0),
                t.narrow(dim, 0, max(0, t.shape[dim] - 1)),
                torch.cat([t, t], dim),
            )
        )
    )


def huge(draw, t):
    """More elements than 32 bits count, in almost no memory."""
    return t[:1].expand(2**31, *t.shape[1:]) if t.dim() and t.shape[0] else t


def other_strides(draw, t):
    """The same values behind other strides, or one row behind every index."""
    if t.dim() == 0:
        return t
    every_other = tuple(slice(1, 2 * n + 1, 2) for n in t.shape)
    spaced = t.new_zeros([2 * n + 1 for n in t.shape])[every_other]
    turned = t.new_zeros(t.shape[::-1]).permute(*reversed(range(t.dim())))
    same_values = draw(st.sampled_from((spaced, turned))).copy_(t)
    return draw(st.sampled_from((same_values, t[:1].expand(t.shape) if t.shape[0] else t)))


def other_values(draw, t):
    if t.numel() == 0 or t.dtype in (torch.float8_e4m3fn, torch.float8_e8m0fnu):
        return t
    changed = t.detach().clone(memory_format=torch.contiguous_format)
    flat = changed.view(-1)
    if t.dtype.is_floating_point:
        value = draw(st.sampled_from(FLOATS))
    else:
        info = torch.iinfo(t.dtype)
        value = draw(
            st.sampled_from(
                [
                    v
                    for v in (*INTEGERS, t.shape[0], info.max, info.min)
                    if info.min <= v <= info.max
                ]
            )
        )
    if draw(st.booleans()):
        flat[:] = torch.tensor(value).to(t.dtype)
    else:
        flat[draw(st.integers(0, flat.numel() - 1))] = torch.tensor(value).to(t.dtype)
    return changed


def other_kind(draw, t):
    """A tensor that is not an ordinary one on the CPU."""
    kinds = [t.to("meta"), torch.nn.Parameter(t, requires_grad=False)]
    if t.dtype in (torch.float32, torch.int32, torch.int64):
        kinds += [t.to_sparse(), torch._neg_view(-t)]
    if t.dtype == torch.float32:
        kinds += [t.clone().requires_grad_(), t.numpy()]
    return draw(st.sampled_from(kinds))


def garbage(draw, t):
    return draw(st.sampled_from(GARBAGE))


# The case's tolerance still applies.
HARMLESS = (other_rank, other_size, other_strides, other_strides, other_kind)
MUTATIONS = (*HARMLESS, other_dtype, other_values, huge, garbage)


def mutate(draw, argument, others):
    """One argument made odd; whether the case's tolerance still applies."""
    if not isinstance(argument, torch.Tensor):
        return draw(st.sampled_from((*INTEGERS, *FLOATS, *GARBAGE, True))), False
    if argument.numel() > HUGE or argument.layout != torch.strided:
        return argument, False
    tensors = [t for t in others if isinstance(t, torch.Tensor)]
    if draw(st.integers(0, 7)) == 0:
        return draw(st.sampled_from(tensors)), False  # aliasing
    mutation = draw(st.sampled_from(MUTATIONS))
    return mutation(draw, argument), mutation in HARMLESS


@functools.cache  # making the cases costs more than the call they are made odd for
def small_cases(name):
    def size(argument):
        return argument.numel() if isinstance(argument, torch.Tensor) else 0

    return [c for c in OPERATORS[name].iterate_cases() if sum(map(size, c.arguments)) <= SMALL]


def describe(argument):
    if not isinstance(argument, torch.Tensor):
        return repr(argument)
    layout = argument.stride() if argument.layout == torch.strided else argument.layout
    return f"{argument.dtype} {list(argument.shape)} strides {layout} {argument.device}"


def check(operator, log, data):
    case = data.draw(st.sampled_from(small_cases(operator.name)), label="case")
    arguments = [map_tensors(torch.clone, a) for a in case.arguments]
    exact = True
    for i in data.draw(st.sets(st.integers(0, len(arguments) - 1), min_size=1, max_size=2)):
        arguments[i], harmless = mutate(data.draw, arguments[i], arguments)
        exact &= harmless
    call = f"{operator.name}({', '.join(map(describe, arguments))})"
    note(call)
    log.seek(0)
    log.write(call + "\n")
    log.truncate()
    log.flush()
    before = [map_tensors(plain_copy, a) for a in arguments]
    faulthandler.dump_traceback_later(SECONDS_PER_CALL, exit=True)
    try:
        result = operator(*arguments)
    except (Dsv4Error, MemoryError):
        check_unwritten(operator, before, arguments)
        return
    except (RuntimeError, TypeError) as error:
        if not TORCH_ERRORS.search(str(error)):
            raise
        check_unwritten(operator, before, arguments)
        return
    finally:
        faulthandler.cancel_dump_traceback_later()
    limits = operator.tolerance.limits(case.profile) if exact else (float("inf"), 0.0)
    check_answer(operator, before, arguments, result, limits)


def plain_copy(tensor):
    """A contiguous copy with a storage of its own; tensors that are no data, or too much, stay."""
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.numel() > HUGE:
        return tensor
    return tensor.detach().resolve_neg().clone(memory_format=torch.contiguous_format)


def check_unwritten(operator, before, arguments):
    for i in mutated_arguments(operator):
        if isinstance(before[i], torch.Tensor) and before[i] is not arguments[i]:
            comparison = compare(arguments[i].detach(), before[i], (0, 0))
            assert comparison.ok, f"written before the error: {comparison.detail}"


def as_passed(operator, arguments):
    """True is 1 where torch's schema wants a number."""
    types = [
        a.type.kind() for a in getattr(torch.ops.dsv4, operator.name).default._schema.arguments
    ]
    return [
        value if kind == "BoolType" or not isinstance(value, bool) else int(value)
        for kind, value in zip(types, arguments, strict=False)
    ]


def all_of(result):
    """The results of a call that may have none, one or several."""
    return () if result is None else (result,) if isinstance(result, torch.Tensor) else result


def check_answer(operator, before, arguments, result, limits):
    """What was accepted must give what the reference gives on plain copies of the arguments."""
    if any(isinstance(a, torch.Tensor) and a.numel() > HUGE for a in arguments):
        return
    given = tuple(map_tensors(plain_copy, a) for a in before)
    try:
        want = operator.reference(*as_passed(operator, before))
    except RuntimeError as error:
        if "can't allocate memory" in str(error):
            return  # a formula of more memory than this program may have, as H of 2^14 channels
        raise
    mutated = mutated_arguments(operator)
    answers = [
        (*all_of(result), *(arguments[i] for i in mutated)),
        (*all_of(want), *(before[i] for i in mutated)),
    ]
    if operator.measure is not None:  # several answers are right: what they have in common
        sample = Sample(operator, Case("fuzzed", "ideal", given))
        answers = [sample.measured(answer) for answer in answers]
    pairs = zip(*answers, strict=True)
    for got, wanted in pairs:
        if got.device.type == "cpu":
            comparison = compare(got, wanted, limits)
            acceptable = comparison.ok or (
                limits[0] == float("inf") and "worst" in comparison.detail
            )
            assert acceptable, comparison.detail


def main(examples, log_path, *families):
    faulthandler.enable()
    torch.set_num_threads(1)
    now = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, resource.RLIM_INFINITY))
    with open(log_path, "w+") as log:
        for family in families:
            for operator in FAMILIES[family]:
                fuzz(operator, int(examples), log)


def fuzz(operator, examples, log):
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data):
        check(operator, log, data)

    run()


def cache_and_part():
    cache = torch.zeros(2, 4, 8)
    return cache, cache[0], torch.arange(4)


PAST_FAILURES = {
    "None for a tensor": ("rms_norm", (None, torch.ones(4), 1e-6), "argument 'x': found None"),
    "None behind a tensor": (
        "rms_norm",
        (torch.ones(2, 4), None, 1e-6),
        "argument 'weight': found None",
    ),
    "sparse": (
        "rms_norm",
        (torch.ones(2, 4).to_sparse(), torch.ones(4), 1e-6),
        "layout torch.sparse_coo",
    ),
    "rows inside the cache": (
        "write_cache",
        cache_and_part(),
        "argument 'rows': found memory of 'cache'",
    ),
    "cache over itself": (
        "write_cache",
        (torch.zeros(1, 1, 8).expand(2, 4, 8), torch.ones(1, 8), torch.zeros(1, dtype=torch.int64)),
        "elements that share no memory",
    ),
    "2^63 choices": (
        "moe_combine",
        (torch.ones(0, 5), torch.ones(0, dtype=torch.int32), 2**63 - 1),
        "argument 'k'",
    ),
    "2^63 streams": (
        "embed_streams",
        (torch.ones(0, dtype=torch.int64), torch.ones(5, 8), 2**63 - 1),
        "1 to 1024",
    ),
}


@pytest.mark.parametrize("failure", PAST_FAILURES)
def test_past_failures(failure):
    name, arguments, message = PAST_FAILURES[failure]
    with pytest.raises(ArgumentError, match=re.escape(message)):
        OPERATORS[name](*arguments)


def test_empty_rows_with_strides_are_written():
    rows = torch.zeros(0, 1024)[:, ::2]
    OPERATORS["write_cache_fp8_ds_mla"](
        torch.zeros(2, 2304, dtype=torch.uint8), rows, rows[:, 0].long(), 3
    )


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("rope", "inv_freq"),
        ("gate_topk", "bias"),
        ("hc_pre", "base"),
        ("hc_head", "scale"),
        ("hc_post", "comb"),
        ("sparse_attention", "sink"),
    ],
)
def test_a_kernel_leaves_fp64_in_place_of_fp32_to_the_reference(name, of):
    operator = OPERATORS[name]
    case = next(c for c in small_cases(name) if c.arguments[0].dtype == torch.float32)
    at = [a.name for a in getattr(torch.ops.dsv4, name).default._schema.arguments].index(of)
    arguments = list(case.arguments)
    arguments[at] = arguments[at].double()
    want = all_of(operator.reference(*arguments))
    got = all_of(operator(*arguments))
    assert len(want) == len(got)
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize(
    "families", [list(FAMILIES)[i::PROGRAMS] for i in range(PROGRAMS)], ids=str
)
def test_no_argument_crashes(families, tmp_path, request):
    log = tmp_path / "last-call"
    examples = MORE_EXAMPLES if request.config.getoption("--long") else EXAMPLES
    program = [sys.executable, __file__, str(examples), str(log), *families]
    done = subprocess.run(program, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, (
        f"exit code {done.returncode} at {log.read_text()}\n{done.stderr[-6000:]}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
