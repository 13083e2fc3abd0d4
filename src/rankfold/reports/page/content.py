"""What the page says: a saved model's plan, metrics and search, as its template needs them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from rankfold.budget import LATENCY, RESOURCES, Cost
from rankfold.plan import LayerPlan, Plan, channels_named
from rankfold.reports.layout import grouped
from rankfold.reports.page.pictures import lines, number
from rankfold.reports.tables import SLOWER, calibration, speed, timing

SHOWN = 24
"""Curves, and layers of a search's history, that are drawn: those where most is saved."""
TITLES = {"params": "Parameters", "macs": "MACs", "bytes": "Bytes", "latency": "Microseconds"}


@dataclass(frozen=True)
class Figure:
    """A number before and after, as it is shown, and what is left of it in percent, where that says something."""

    title: str
    before: str
    after: str
    share: float | None = None


@dataclass(frozen=True)
class Row:
    """A layer: what it was and became, its cost as shares of the largest layer's, and its error, in percent."""

    name: str
    kind: str
    weight: str
    becomes: str
    changed: bool
    before: str
    after: str
    wide: float
    kept: float
    error: float | None


def content_of(
    plan: Plan,
    metrics: Mapping[str, Any],
    evaluations: Mapping[str, Any],
    trace: Mapping[str, Any] | None,
    curves: Mapping[str, Any] | None,
    pictures: Sequence[str],
) -> dict[str, Any]:
    """All that the template is filled with."""
    unit = next((one for one in plan.settings.get("budget", {}) if one in RESOURCES), "macs")
    refined: Mapping[str, Sequence[float]] = plan.settings.get("refined_blocks", {})
    times = list(metrics.get("latency_ms", {}).values())
    return {
        "name": plan.source.get("model") or "A network",
        "figures": [*_evaluated(evaluations), *_scores(metrics), *_costs(plan)],
        "unmeasured": not metrics.get("fine_tuning") and not evaluations,
        "slower": speed(*times) if len(times) == 2 and times[1] > SLOWER * times[0] else "",
        "told": _told(plan),
        "unit": TITLES[unit],
        "rows": _rows(plan, unit),
        "narrowings": [
            (one.name, one.channels.size, len(one.kept), 100 * one.predicted_error) for one in plan.narrowings
        ],
        "curves": _curves(plan, curves, unit),
        "history": _history(trace),
        "inputs": pictures,
        "refined": [(name, 100 * before, 100 * after) for name, (before, after) in refined.items()],
        "training": _training(metrics),
        "skipped": _skipped(plan.skipped),
        "settings": {name: _as_text(value) for name, value in plan.settings.items() if name != "refined_blocks"},
        "command": _command(plan),
        "code": _code(plan),
        "seconds": metrics.get("seconds"),
    }


def _evaluated(evaluations: Mapping[str, Any]) -> list[Figure]:
    """What the model was scored with since, on whichever data."""
    found = []
    for data, one in evaluations.items():
        was, now, name = one["original"], one["compressed"], data.rpartition("/")[2]
        if "perplexity" in now:
            found.append(Figure(f"Perplexity, {name}", f"{was['perplexity']:.2f}", f"{now['perplexity']:.2f}"))
            speeds = (was["tokens_per_second"]["written"], now["tokens_per_second"]["written"])
            if all(speeds):
                share = 100 * speeds[1] / speeds[0]
                found.append(Figure("Tokens per second, written", f"{speeds[0]:.1f}", f"{speeds[1]:.1f}", share))
        elif "spearman" in now:
            found.append(Figure(f"Spearman, {name}", f"{was['spearman']:.2f} %", f"{now['spearman']:.2f} %"))
        else:
            before = "an unscored original" if was["top1"] is None else f"{was['top1']:.2f} %"
            found.append(Figure(f"Top-1, {name}", before, f"{now['top1']:.2f} %"))
    return found


def _scores(metrics: Mapping[str, Any]) -> list[Figure]:
    """What is known of accuracy and latency."""
    tuned: Mapping[str, Any] = metrics.get("fine_tuning", {})
    found = []
    measures = (("top1", "Top-1", " %"), ("agreement", "Agreement", " %"), ("perplexity", "Perplexity", ""))
    for measure, name, unit in measures:
        for part, title in (("test", "test data"), ("held_out", "held out")):
            scores: Mapping[str, float] = tuned.get(f"{part}_{measure}") or {}
            if scores:
                was, now = (f"{scores[stage]:.2f}{unit}" for stage in ("original", "fine-tuned"))
                found.append(Figure(f"{name}, {title}", was, now))
    times = tuned.get("latency_ms") or metrics.get("latency_ms")
    if times:
        was, now = times["original"], times.get("fine-tuned", times["compressed"])
        found.append(Figure("Latency, one input", f"{was:.3g} ms", f"{now:.3g} ms", 100 * now / max(was, 1e-9)))
    return found


def _costs(plan: Plan) -> list[Figure]:
    """What the whole network costs."""
    pairs = [
        (TITLES[unit], getattr(plan.before, unit), getattr(plan.after, unit)) for unit in ("macs", "params", "bytes")
    ]
    return [Figure(title, number(was), number(now), 100 * now / max(was, 1)) for title, was, now in pairs]


def _told(plan: Plan) -> str:
    """What was done, in sentences."""
    budget = ", ".join(f"{unit} {limit}" for unit, limit in plan.settings.get("budget", {}).items())
    narrowed = f" and {len(plan.narrowings)} hidden activations lost channels" if plan.narrowings else ""
    parts = [
        f"Within the budget ({budget}), {len(plan.decomposed)} of {len(plan.layers)} layers became products of smaller "
        f"ones{narrowed}.",
    ]
    if "calibration_samples" in plan.settings or plan.settings.get("metric") == "frobenius":
        known = calibration(plan.settings)
        parts.append(f"{known[:1].upper()}{known[1:]}.")
    bound = plan.settings.get("bound")
    if bound is not None:
        reached = plan.settings.get("objective", 0.0)
        parts.append(f"The search reached {reached:.4g}; no plan within the budget is below {bound:.4g}.")
    return " ".join([*parts, *timing(plan.settings)])


def _rows(plan: Plan, unit: str) -> list[Row]:
    largest = max((_amount(one.before, unit) for one in plan.layers), default=1) or 1
    return [_row(layer, largest, unit) for layer in plan.layers]


def _amount(cost: Cost, unit: str) -> int:
    """What a layer costs, times in microseconds."""
    found: int = getattr(cost, unit)
    return found // 1000 if unit == LATENCY else found


def _row(layer: LayerPlan, largest: int, unit: str) -> Row:
    was, now = _amount(layer.before, unit), _amount(layer.after, unit)
    narrower = "×".join(map(str, layer.narrowed))
    factors = f"{layer.decomposition} {' · '.join(map(str, layer.ranks))}" if layer.decomposition else ""
    changed = bool(narrower or factors)
    return Row(
        layer.name or "the model itself",
        layer.kind,
        "×".join(map(str, layer.weight)),
        ", ".join(filter(None, (narrower, factors))) or "as it was",
        changed,
        number(was),
        number(now),
        100 * was / largest,
        100 * now / largest,
        100 * layer.error if changed else None,
    )


def _curves(plan: Plan, curves: Mapping[str, Any] | None, unit: str) -> list[tuple[str, Markup]]:
    """Error over cost of the layers and channel sets where most is saved, each with the chosen point."""
    if not curves:
        return []
    unit, points = curves.get("unit", unit), curves.get("points", {})
    chosen: dict[str, tuple[float, float, int]] = {}
    for layer in plan.layers:
        was, now = (getattr(one, unit) for one in (layer.before, layer.after))
        if layer.decomposition and not layer.narrowed:
            chosen[layer.name] = (now / max(was, 1), layer.predicted_error, was - now)
    for one in plan.narrowings:
        saved = sum(
            _saved(layer.before, layer.after, unit) for layer in plan.layers if layer.name in one.channels.layers
        )
        chosen[channels_named(one.name)] = (len(one.kept) / one.channels.size, one.predicted_error, saved)
    names = sorted((name for name in chosen if name in points), key=lambda name: -chosen[name][2])[:SHOWN]
    found = []
    for name in names:
        share, error, _ = chosen[name]
        across = (
            "share of the channels kept"
            if name not in {layer.name for layer in plan.layers}
            else f"share of its {unit}"
        )
        title = f"{name}: at {100 * share:.0f} % of its {unit} the squared relative error is {100 * error:.2g} %"
        drawn = lines(
            title,
            {"error": [(x, 100 * y) for x, y in points[name]]},
            across,
            "error, %",
            log=True,
            marked=[(share, 100 * error)],
        )
        found.append((name, drawn))
    return found


def _saved(before: Cost, after: Cost, unit: str) -> int:
    return int(getattr(before, unit) - getattr(after, unit))


def _history(trace: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """How ranks converged in a continuous search: losses, and each layer's entropy over the steps."""
    steps = trace["steps"] if trace else []
    if not steps or not trace:
        return None
    names = dict.fromkeys(name for step in steps for name in step["losses"])
    losses = {
        name: [(k, step["losses"][name]) for k, step in enumerate(steps) if name in step["losses"]] for name in names
    }
    entropy = {
        layer: [(k, step["entropy"][place]) for k, step in enumerate(steps)]
        for place, layer in enumerate(trace["layers"][:SHOWN])
    }
    ends = [(layer, steps[0]["likeliest"][k], steps[-1]["likeliest"][k]) for k, layer in enumerate(trace["layers"])]
    return {
        "steps": len(steps),
        "losses": lines("Losses of the search over its steps", losses, "step", "loss"),
        "entropy": lines("Entropy of each layer's choice over the steps", entropy, "step", "entropy, nats"),
        "ends": ends,
    }


def _training(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """The course of fine-tuning."""
    tuned: Mapping[str, Any] = metrics.get("fine_tuning", {})
    epochs = tuned.get("epochs") or []
    if not epochs:
        return None
    places = range(1, len(epochs) + 1)
    losses = [(k, one["loss"]) for k, one in zip(places, epochs, strict=True)]
    drawn: dict[str, Any] = {
        "loss": lines("Loss over the epochs of fine-tuning", {"loss": losses}, "epoch", "loss"),
        "score": None,
    }
    share = "agreement, %" if "held_out_agreement" in tuned else "top-1, %"
    for measure, title in (("top1", share), ("perplexity", "perplexity")):
        scores = [(k, one[measure]) for k, one in zip(places, epochs, strict=True) if one.get(measure) is not None]
        if scores:
            told = f"{title.partition(',')[0].capitalize()} on held-out data over the epochs"
            drawn |= {"score": lines(told, {title.partition(",")[0]: scores}, "epoch", title), "told": told}
    return drawn


def _skipped(skipped: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """Reasons with the layers that they are of, in groups of names that are written as one."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        by_reason.setdefault(reason, []).append(name or "the model itself")
    return [(reason, list(grouped(names))) for reason, names in by_reason.items()]


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _command(plan: Plan) -> str:
    """The command that makes it again, where it was made by one or could have been."""
    source, settings = plan.source, plan.settings
    if "model" not in source:
        return ""
    words = ["rankfold", "compress", source["model"]]
    if "weights" in source:
        words += ["--weights", source["weights"]]
    timed = settings.get("timed", {})
    words += ["--batch", str(timed["batch"]), "--threads", str(timed["threads"])] if timed else []
    words += ["--channels-last"] if timed.get("channels_last") else []
    words += ["--compile"] if timed.get("compiled") else []
    decomposition = settings.get("decomposition", "tucker")
    named = [f"{one}={_names(two)}" for one, two in decomposition.items()] if isinstance(decomposition, dict) else None
    for one in named or [_names(decomposition)]:
        words += ["--decomposition", one]
    for unit, limit in settings.get("budget", {}).items():
        words += ["--budget", f"{unit}={limit}"]
    if settings.get("calibration", "none").startswith("synthetic"):
        words += ["--calibration", "synthetic", "--calibration-samples", str(settings["calibration_samples"])]
    elif settings.get("calibration") == "given inputs":
        words += ["--calibration", source.get("calibration", "DATA")]
        words += ["--calibration-samples", str(settings["calibration_samples"])]
        words += [word for name in ("length", "written") if name in source for word in (f"--{name}", str(source[name]))]
    else:
        words += ["--calibration", "none"]
    if settings.get("refine_epochs"):
        words += ["--refine", str(settings["refine_epochs"])]
        words += [word for pattern in settings.get("refine_blocks", ()) for word in ("--refine-blocks", pattern)]
        words += ["--refine-copies", str(settings["refine_copies"])] if "refine_copies" in settings else []
    words += ["--distil", str(settings["distilled"]["epochs"])] if "distilled" in settings else []
    return shlex.join([*words, "--out", "DIR"])


def _names(given: Any) -> str:
    return given if isinstance(given, str) else ",".join(given)


def _code(plan: Plan) -> str:
    """Code that makes it again."""
    settings = plan.settings
    budget = ", ".join(f"{unit}={limit!r}" for unit, limit in settings.get("budget", {}).items())
    given = settings.get("calibration", "none")
    data = "batches" if given == "given inputs" else repr("synthetic" if given.startswith("synthetic") else "none")
    more = "".join(
        f", {name}={tuple(value) if isinstance(value, list) else value!r}"
        for name in ("blocks", "mixed", "batch_size", "copies")
        if (value := settings.get(f"refine_{name}"))
    )
    epochs = settings.get("refine_epochs")
    told = f"rankfold.calibration.Refining({epochs}{more})" if more else epochs
    refine = f", refine={told}" if epochs else ""
    distil = f", distil={settings['distilled']['epochs']}" if "distilled" in settings else ""
    return (
        "import rankfold\n\n"
        "result = rankfold.compress(\n    model, example_inputs,\n"
        f"    decomposition={settings.get('decomposition', 'tucker')!r}, budget=rankfold.Budget({budget}),\n"
        f"    calibration={data}{refine}{distil},\n)"
    )
