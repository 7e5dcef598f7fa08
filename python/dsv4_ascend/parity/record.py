"""Recording a parity run as a bundle, case by case, in the memory of one case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from importlib import metadata

import torch

from dsv4_ascend.checkpoint.safetensors_stream import SafetensorsStream
from dsv4_ascend.parity.bundle import (
    KEY,
    Machine,
    Manifest,
    RecordedCase,
    Run,
    TensorName,
    to_text,
)
from dsv4_ascend.parity.report import OperatorReport, Selection
from dsv4_ascend.parity.runner import Outcome, Sample, mutated_arguments
from dsv4_backend import _C
from dsv4_backend.support import probe


class Recorder:
    """Collects outcomes; `finish` writes the bundle. An observer of `run_cases`."""

    def __init__(self, stream: SafetensorsStream) -> None:
        self._stream = stream
        self._cases: list[RecordedCase] = []

    def __call__(self, sample: Sample, implementation: str, seconds: float, got: Outcome) -> None:
        """Add one run of a case; its arguments too where it is the first."""
        if not self._cases or self._cases[-1].name != sample.name:
            self._cases.append(self._case(sample))
        case = self._cases[-1]
        prefix = f"{case.operator}.{len(self._cases) - 1}.run{len(case.runs)}"
        names = [f"{prefix}.{name}" for name in compared_names(sample)]
        outputs = tuple(
            self._stream.add(name, value) if isinstance(value, torch.Tensor) else None
            for name, value in zip(names, got.compared, strict=False)
        )
        run = Run(implementation, seconds, outputs, got.error)
        self._cases[-1] = replace(case, runs=(*case.runs, run))

    def finish(
        self, selection: Selection, reports: Sequence[OperatorReport], complete: bool
    ) -> int:
        """Write the bundle under its name; how many cases it has."""
        cases = tuple(case for case in self._cases if case.runs)  # not one that was interrupted
        left_out = tuple(case for report in reports for case in report.left_out)
        manifest = Manifest(
            machine=machine_here(selection.device),
            pattern=selection.pattern,
            profile=selection.profile,
            complete=complete,
            cases=cases,
            left_out=left_out,
        )
        self._stream.finish({KEY: to_text(manifest)})
        return len(cases)

    def _case(self, sample: Sample) -> RecordedCase:
        case = sample.case
        # By number: names of cases are not legal in names of tensors.
        prefix = f"{sample.operator.name}.{len(self._cases)}"
        arguments = tuple(
            TensorName(self._stream.add(f"{prefix}.{name}", value))
            if isinstance(value, torch.Tensor)
            else value
            for name, value in zip(argument_names(sample), case.arguments, strict=False)
        )
        return RecordedCase(sample.operator.name, case.profile, case.name, arguments, ())


def argument_names(sample: Sample) -> list[str]:
    """Of the schema."""
    schema = getattr(torch.ops.dsv4, sample.operator.name).default._schema
    return [argument.name for argument in schema.arguments]


def compared_names(sample: Sample) -> list[str]:
    """Outputs, by name or place, then the written arguments."""
    schema = getattr(torch.ops.dsv4, sample.operator.name).default._schema
    outputs = [returned.name or f"output{i}" for i, returned in enumerate(schema.returns)]
    written = [schema.arguments[i].name for i in mutated_arguments(sample.operator)]
    return [*outputs, *(f"{name}-after" for name in written)]


def machine_here(device: str) -> Machine:
    """The machine of this process as a bundle names it."""
    found = probe()
    return Machine(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        dsv4_ascend=metadata.version("dsv4-ascend"),
        device=device,
        torch=found.torch,
        torch_npu=found.torch_npu,
        cann=found.npu_cann,
        chip=found.npu_name,
        software=found.npu_is_software,
        machine=found.machine,
        isa=_C.isa(),
    )
