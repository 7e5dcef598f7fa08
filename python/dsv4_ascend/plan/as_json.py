"""A plan as JSON: plain numbers in bytes and seconds."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dsv4_ascend.plan.planner import Plan
from dsv4_ascend.plan.reasons import why_fastest, why_largest
from dsv4_ascend.plan.search import Candidate
from dsv4_ascend.plan.times import Step


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything that the tables say, unrounded; bytes and seconds of operator time."""
    question, chosen, cache = plan.question, plan.chosen, plan.cache
    return {
        "question": {
            "model": question.model,
            "device": question.device,
            "memory_gb": question.size_gb,
            "count": question.count,
            "context": question.context,
            "batch": question.batch,
            "draft_tokens": question.drafts,
            "precision": question.precision.name,
            "cache": question.cache.name,
            "block_size": question.pages.block,
            "graph": question.graph,
            "preset": question.preset,
        },
        "verdict": chosen.memory.verdict,
        "breaks": chosen.memory.breaks,
        "fits_with": list(plan.ways),
        "chosen": asdict(chosen.layout),
        "fastest": asdict(plan.fastest.layout) if plan.fastest else None,
        "most_requests": asdict(plan.largest.layout) if plan.largest else None,
        "reasons": [*why_fastest(plan), *why_largest(plan)],
        "layouts": [_layout(one) for one in plan.candidates],
        "memory": _memory(chosen),
        "cache": {
            "rows": dict(cache.rows),
            "pages": dict(cache.paged),
            "one_request": cache.total,
            "one_request_in_pages": cache.total_paged,
            "waste": cache.waste,
            "waste_of_compressed": cache.compressed_waste,
            "prefix_unit_tokens": cache.hit_unit,
        },
        "decode": {
            "time": "operator time",
            "preset": _step(chosen.decode),
            "roofline": _step(plan.decode_roofline),
            "seconds_per_token": chosen.tpot(chosen.decode),
            "bottleneck": chosen.decode.bottleneck.name,
        },
        "prefill": {
            "time": "operator time",
            "preset": _step(plan.prefill),
            "roofline": _step(plan.prefill_roofline),
        },
        "compute_per_communication": [asdict(one) | {"hidden": one.hidden} for one in plan.ratios],
        "what_if": [
            {"change": one.name, "option": one.option, "seconds": one.step.seconds}
            for one in plan.what_ifs
        ],
        "notes": [text for _, text in plan.notes],
    }


def _layout(one: Candidate) -> dict[str, Any]:
    found: dict[str, Any] = asdict(one.layout) | {"refused": one.refused}
    if one.refused:
        return found
    memory = one.memory
    found |= {"verdict": memory.verdict, "requests": memory.requests, "free": memory.free}
    if one.feasible:
        found |= {
            "step_seconds": one.decode.seconds,
            "seconds_per_token": one.tpot(one.decode),
            "tokens_per_second_per_device": one.tokens_per_second(one.decode, memory.per_group),
        }
    return found


def _memory(one: Candidate) -> dict[str, Any]:
    memory = one.memory
    return {
        "visible": memory.visible,
        "budget": memory.budget,
        "weights": memory.weights,
        "draft": memory.draft,
        "communication": memory.comm,
        "workspace": memory.workspace,
        "caches": memory.per_group * memory.cache,
        "head_room": memory.head_room,
        "requests": memory.requests,
        "requests_in_pages": memory.held_in_pages,
    }


def _step(step: Step) -> dict[str, Any]:
    return {
        "seconds": step.seconds,
        "classes": {
            one.name: {"seconds": one.seconds, "bound": one.bound, **one.parts}
            for one in step.classes
            if one.seconds
        },
        "bounds": step.parts(),
    }
