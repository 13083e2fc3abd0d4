"""What a user asked to be calibrated on, as moments, and what a plan says of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import nn

from rankfold.calibration.moments import Calibration, calibrate
from rankfold.calibration.synthetic import advice, synthetic_like
from rankfold.errors import UnknownNameError
from rankfold.network.finding import Layers
from rankfold.network.passes import Inputs, examples_in, few, output_of, parted, run
from rankfold.network.precision import takes_bfloat16
from rankfold.progress import Progress

HELD_SHARE = 8
"""Of how many calibration inputs one is held back from the moments where errors are priced on the network."""
HELD_MOST = 64
"""How many are held back at most."""
HELD_ROWS = 2**12
"""Rows of outputs, about, that those hold at most which have one for every token: comparisons take no more."""


def calibrated(
    model: nn.Module,
    layers: Layers,
    example_inputs: Inputs,
    given: str | Calibration | Iterable[Any] | None,
    *,
    samples: int | None,
    of_weights: bool,
    progress: Progress,
) -> Calibration:
    """The moments that `compress` is asked to go by; without any where errors are those of the weights.

    With `of_weights` they are by default; otherwise some of the inputs are held back from the moments.
    """
    if isinstance(given, Calibration):
        return given
    reason = "asked for"
    if given == "auto" and of_weights:
        given, reason = (
            "none",
            "the budget limits the error, which is that of the weights unless calibration is asked for",
        )
    elif given == "auto":
        given, reason = advice(model, example_inputs)
    if given is None or given == "none":
        return Calibration({}, {}, 0, "none", reason)
    source = "synthetic inputs" if given == "synthetic" else "given inputs"
    if given == "synthetic":
        given = synthetic_like(model, example_inputs, samples, progress=progress)
    elif isinstance(given, str):
        raise UnknownNameError("calibration", given, ("auto", "none", "synthetic"))
    batches = list(given) if isinstance(given, Iterator) else given  # the fits go over them again
    batches, held = (batches, []) if of_weights else parted(batches, HELD_SHARE, _held_most(model, batches))
    narrow = not of_weights and all(takes_bfloat16(model, one) for one in few(batches, 1))
    known = calibrate(model, layers.found, batches, source=source, reason=reason, narrow=narrow, progress=progress)
    return replace(known, held=held)


def _held_most(model: nn.Module, batches: Iterable[Inputs]) -> int:
    """How many inputs are held back at most."""
    for one in few(batches, 1):
        with suppress(Exception):  # a batch that does not fit is told of when moments are measured
            output = output_of(run(model, one))
            if output.ndim == 3:
                return min(HELD_MOST, -(-HELD_ROWS * examples_in(one) // output[..., 0].numel()))
    return HELD_MOST


def provenance(known: Calibration, in_order: bool) -> dict[str, Any]:
    """What the plan says of its metric, and of how factors were fitted."""
    if not known.batches:
        return {"metric": "frobenius", "calibration": known.source, "calibration_reason": known.reason}
    held = sum(map(examples_in, known.held))
    return {
        "metric": "second moments",
        "calibration": known.source,
        "calibration_reason": known.reason,
        "calibration_batches": known.batches,
        "calibration_samples": known.samples + held,
        "calibration_held": held,
        "frobenius_layers": sorted(known.missing),
        **({"approximate_moments": dict(sorted(known.approximate.items()))} if known.approximate else {}),
        **({"calibration_passes": "in bfloat16"} if known.narrow else {}),
        **({"weighted_layers": sorted(known.weights)} if known.weights else {}),
        **({"metric_of_outputs": sorted(known.outputs)} if known.outputs else {}),
        "fitted": "in forward order" if in_order else "layer by layer",
    }
