"""Questions and answers of tests, with Flash on one A3 node where nothing else is said."""

from dataclasses import replace

from dsv4_ascend.plan.formats import weight_bytes
from dsv4_ascend.plan.planner import plan
from dsv4_ascend.plan.question import Options, ask
from dsv4_ascend.plan.search import Judge

DEFAULTS = {"model": "flash", "device": "910C", "count": 16, "context": 8192}


def question(**options):
    return ask(Options(**{**DEFAULTS, **options}))


def planned(**options):
    return plan(question(**options))


def candidate(layout, **options):
    return Judge.of(question(**options)).candidate(layout)


def tabled_weights(asked):
    """The weights as the planner's tables count them: without norms, sinks and token tables."""
    weights = weight_bytes(asked.shapes, asked.precision)
    main, draft = (asked.precision.bytes_of(c) for c in (asked.shapes.main, asked.shapes.draft))
    return replace(
        weights,
        replicated=weights.replicated - main["norms"] - main["tables"],
        draft=weights.draft - draft["norms"],
    )
