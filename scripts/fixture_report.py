"""What a comparison with golden data found: kept as numbers, written for people or as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

import flexselect

#: Largest difference allowed; what is not named here must be equal.
TOLERANCES = {
    "vision_features": 1e-4,
    "vision_features_selector": 1e-4,
    "selector_inputs_embeds": 1e-4,
    "scores": 2e-5,
    "inputs_embeds": 1e-4,
    "logits": 1e-4,
    "step_logits": 1e-4,
}

#: How a folder may come out, from best to worst.
AGREES, SKIPPED, DIFFERS, UNCHECKED = STATUSES = "agrees", "skipped", "differs", "not checked"


@dataclass
class Quantity:
    """How far one quantity is off, over all tensors of a case.

    Attributes
    ----------
    allowed : largest difference; 0 where values must be equal.
    worst : largest difference, or for exact quantities how many values differ in one tensor;
        infinite where shapes differ or a value is not a number.
    where : the tensor with the worst difference.
    compared : number of tensors.
    """

    allowed: float
    worst: float = 0.0
    where: str = ""
    compared: int = 0

    @property
    def ok(self) -> bool:
        """Whether all tensors agree."""
        return self.worst <= self.allowed


@dataclass
class Report:
    """What was found in one folder.

    Attributes
    ----------
    folder, title : what was checked.
    status : one of `STATUSES`.
    error : why it was not checked, or skipped.
    quantities : by name, how far off each is.
    mismatches : one line a tensor that differs.
    known : where the reference is wrong and we deliberately differ, and in which runs.
    skipped : why something was not compared, and what.
    """

    folder: str
    title: str = ""
    status: str = AGREES
    error: str | None = None
    quantities: dict[str, Quantity] = field(default_factory=dict)
    mismatches: list[str] = field(default_factory=list)
    known: dict[str, list[str]] = field(default_factory=dict)
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def compare(self, quantity: str, where: str, ours: Any, theirs: Any) -> None:
        """Note how far ``ours`` is from ``theirs``: tensors, or what makes one."""
        allowed = TOLERANCES.get(quantity, 0.0)
        entry = self.quantities.setdefault(quantity, Quantity(allowed))
        worst, why = difference(torch.as_tensor(ours), torch.as_tensor(theirs), bool(allowed))
        entry.compared += 1
        if not entry.where or worst > entry.worst:
            entry.worst, entry.where = worst, where
        if worst > allowed:
            self.status = DIFFERS
            self.mismatches.append(f"{quantity}: {where}: {why}")

    def skip(self, where: str, reason: str) -> None:
        """Note that ``where`` is not compared."""
        self.skipped.setdefault(reason, []).append(where)


def exit_code(reports: Sequence[Report]) -> int:
    """Return 2 if a folder, or all there was, could not be checked, 1 for a difference, else 0."""
    found = {report.status for report in reports}
    if UNCHECKED in found or found <= {SKIPPED}:
        return 2
    return int(DIFFERS in found)


def as_json(reports: Sequence[Report], code: int) -> dict[str, Any]:
    """Return everything as JSON values; an infinite difference becomes null."""
    cases = [asdict(report) for report in reports]
    for case in cases:
        for entry in case["quantities"].values():
            entry["ok"] = entry["worst"] <= entry["allowed"]
            entry["worst"] = entry["worst"] if math.isfinite(entry["worst"]) else None
    return {
        "exit_code": code,
        "versions": {
            "flexselect": flexselect.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "cases": cases,
    }


def difference(ours: Tensor, theirs: Tensor, tolerant: bool) -> tuple[float, str]:
    """Return the largest difference, and in words where it is.

    If not ``tolerant``, the difference is the number of values that are not equal. It is infinite
    where shapes differ or a value is not a number.
    """
    if ours.shape != theirs.shape:
        return math.inf, f"shape {list(ours.shape)}, expected {list(theirs.shape)}"
    if not ours.numel():
        return 0.0, ""
    if tolerant:
        gaps = (ours.double() - theirs.double()).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    else:
        gaps = (ours != theirs).double()
    flat = int(gaps.argmax())
    place = [int(index) for index in torch.unravel_index(torch.tensor(flat), ours.shape)]
    values = f"{ours.flatten()[flat].item():.8g}, expected {theirs.flatten()[flat].item():.8g}"
    if tolerant:
        worst = float(gaps.max())
        return worst, f"off by {worst:.2g} at {place}: {values}"
    worst = float(gaps.sum())
    return worst, f"{worst:.0f} of {ours.numel()} differ, first at {place}: {values}"


def describe(report: Report) -> str:
    """Write a report for people."""
    title = f" ({report.title})" if report.title else ""
    lines = [f"{report.folder}{title}: {report.status}"]
    if report.error is not None:
        lines.append(f"  {'reason' if report.status == SKIPPED else 'error'}: {report.error}")
    for name, entry in report.quantities.items():
        allowed = f"{entry.allowed:.0e} allowed" if entry.allowed else "must be equal"
        worst = f"{entry.worst:.1e}" if entry.allowed else f"{entry.worst:.0f} differ"
        verdict = "ok" if entry.ok else "DIFFERS"
        lines.append(f"  {verdict:8} {name:25} {worst:>10}  {allowed}, {entry.compared} compared")
    lines += [f"  DIFFERS  {line}" for line in report.mismatches]
    for word, noted in (("known", report.known), ("skipped", report.skipped)):
        for reason, where in noted.items():
            lines.append(f"  {word:8} {', '.join(dict.fromkeys(where))}: {reason}")
    return "\n".join(lines)
