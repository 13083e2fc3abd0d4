"""Results as tables for people and as objects for machines. Nothing is computed here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from rankfold.budget import UNITS, Cost
from rankfold.reports.layout import Listing, grouped, shown_name

if TYPE_CHECKING:
    from rankfold.files.export import Exported
    from rankfold.fine_tuning import FineTuning
    from rankfold.pipeline import Result
    from rankfold.plan import LayerPlan
    from rankfold.reports.analysis import Analysis
    from rankfold.reports.demo import Row


def compression_dict(result: Result, out: Path) -> dict[str, Any]:
    """A compression in JSON's types."""
    layers = [
        {
            "name": layer.name,
            "kind": layer.kind,
            "decomposition": layer.decomposition,
            "ranks": list(layer.ranks),
            "narrowed": list(layer.narrowed),
            "error": layer.error,
            "before": layer.before.as_dict(),
            "after": layer.after.as_dict(),
            "aliases": list(layer.aliases),
        }
        for layer in result.plan.layers
    ]
    return {
        "before": result.before.as_dict(),
        "after": result.after.as_dict(),
        "kept": result.after.kept(result.before),
        "seconds": result.seconds,
        "out": str(out),
        "calibration": calibration(result.plan.settings),
        "layers": layers,
        "narrowings": [
            {"read_by": one.name, "channels": one.channels.size, "kept": list(one.kept)}
            for one in result.plan.narrowings
        ],
        "skipped": dict(result.plan.skipped),
    }


def compression(result: Result, out: Path, times: Sequence[float] = ()) -> RenderableType:
    """A compression as a table: layers, skipped layers, totals, and latencies of the original and the result."""
    table = Listing("@layer", "?kind", "?weight", "becomes", "ranks", ">?MACs", ">kept", ">error %")
    for layer in result.plan.layers:
        kept = layer.after.macs / max(layer.before.macs, 1)
        table.add_row(
            shown_name(layer.name),
            layer.kind,
            "×".join(map(str, layer.weight)),
            _becomes(layer),
            " ".join(map(str, layer.ranks)),
            count(layer.before.macs),
            f"{100 * kept:.0f} %",
            f"{100 * layer.error:.1f}" if layer.decomposition or layer.narrowed else "",
        )
    bound = result.plan.settings.get("bound")
    objective = result.plan.settings.get("objective", 0.0)
    proof = f"; no plan within the budget is below {bound:.4g}" if bound is not None else ""
    minimised = result.plan.settings.get("minimised", "error")
    what = "sum of squared relative errors predicted" if minimised == "error" else f"{minimised} kept in these layers"
    if result.plan.settings.get("priced"):
        what = "sum of what errors cost the output predicted"
    notes = [
        totals(result.before, result.after),
        *([Text(speed(*times), "yellow" if times[1] > SLOWER * times[0] else "")] if times else []),
        Text(f"{what} {objective:.4g}{proof}", "dim"),
        Text(calibration(result.plan.settings), "dim"),
        *(Text(sentence, "dim") for sentence in timing(result.plan.settings)),
        Text(f"{out}  ({result.seconds:.1f} s)"),
    ]
    return Group(table, skipped(result.plan.skipped), *notes)


def speed(before: float, after: float) -> str:
    """Both latencies in a line, with what may help where nothing was gained."""
    told = f"latency {before:.3g} → {after:.3g} ms on the example inputs, here ({after / max(before, 1e-9):.2f}×)"
    if after <= SLOWER * before:
        return told
    return (
        f"{told}: slower than the original, as thin layers are where memory and calls cost more than products; try "
        "--budget latency=0.8, which limits what is measured here, or --decomposition interpolative"
    )


def timing(settings: Mapping[str, Any]) -> list[str]:
    """What was predicted and measured where latency is limited, in a sentence."""
    turns, timed = settings.get("latency_turns_ms"), settings.get("timed", {})
    if not turns:
        return []
    told = ", ".join(f"{predicted:.3g} ms predicted and {measured:.3g} measured" for predicted, measured in turns)
    threads = f"{timed['threads']} threads, " if timed.get("threads") else ""
    form = ("last" if timed.get("channels_last") else "first") + (", compiled" if timed.get("compiled") else "")
    return [
        f"Before the fits, plans were timed beside the original: {told} ({timed.get('name')}, {threads}"
        f"{timed.get('inputs')}, channels {form})."
    ]


SLOWER = 1.05
"""Ratio of latencies from which on a result is called slower than its original: below it, it may be noise."""


def _becomes(layer: LayerPlan) -> str | Text:
    """What becomes of a layer: factors, fewer channels, both, or nothing."""
    narrower = "×".join(map(str, layer.narrowed))
    if layer.decomposition:
        return f"{narrower}, {layer.decomposition}" if narrower else layer.decomposition
    return narrower or Text("dense", "dim")


def calibration(settings: Mapping[str, Any]) -> str:
    """What errors were measured by and why, in a line."""
    reason = settings.get("calibration_reason", "asked for")
    if settings.get("metric") == "frobenius":
        return f"calibration: none, errors are those of the weights ({reason})"
    unseen = settings.get("frobenius_layers")
    never = f"; never called on them, so by their weights: {', '.join(grouped(unseen))}" if unseen else ""
    inputs = f"{settings['calibration_samples']:,} {settings['calibration']}"
    after = f"{_refined(settings)}{_distilled(settings)}{never}"
    return f"calibration: {inputs} ({reason}); fitted {settings['fitted']}{after}"


def _refined(settings: Mapping[str, Any]) -> str:
    """How many blocks were refined, and by how much."""
    if "refined_blocks" not in settings:
        return ""
    blocks: Mapping[str, Sequence[float]] = settings["refined_blocks"]
    gains = [1 - after / before for before, after in blocks.values() if after < before]
    if "not_refined" in settings:
        return f"; not refined: {settings['not_refined']}"
    if not gains:
        return "; no block gained by being refined" if blocks else "; not refined: too few inputs to hold some back"
    return f"; {len(gains)} of {len(blocks)} blocks refined, their errors {100 * sum(gains) / len(gains):.0f} % lower"


def _distilled(settings: Mapping[str, Any]) -> str:
    """How much closer to its teacher the whole network came."""
    if "distilled" not in settings:
        return ""
    started, *reached = settings["distilled"]["divergence"]
    if not reached:
        return f"; distilled for {settings['distilled']['epochs']} epochs, with nothing held back to judge by"
    if min(reached) >= started:
        return "; not distilled: on inputs held back it came no closer to the original"
    return f"; distilled, divergence from the original on inputs held back {started:.4g} → {min(reached):.4g}"


def analysis(report: Analysis) -> RenderableType:
    """An analysis as a table: for each layer and decomposition the share of MACs that keeps nine tenths of it."""
    names = list(dict.fromkeys(name for _, savings in report.layers for name in savings))
    table = Listing("@layer", "?kind", "?weight", ">?params", ">MACs", *(f">{name}" for name in names))
    for layer, savings in report.layers:
        cells = []
        for name in names:
            saving = savings.get(name)
            cells.append(f"{100 * saving.macs_kept:.0f} %" if saving else "–")
        shape = "×".join(map(str, layer.weight))
        costs = (count(layer.dense.params), count(layer.dense.macs))
        table.add_row(shown_name(layer.name), layer.kind, shape, *costs, *cells)
    whole = f"{count(report.cost.params)} parameters, {count(report.cost.macs)} MACs, {count(report.cost.bytes)}B"
    shares = report.within_reach
    reach = f"{100 * shares['params']:.1f} % of the parameters and {100 * shares['macs']:.1f} % of the MACs"
    legend = "columns on the right: share of the layer's MACs that keeps 90 % of its energy; –: none saves anything"
    return Group(
        *([table] if report.layers else []),
        skipped(report.skipped),
        Text(f"whole network: {whole}"),
        Text(f"within reach: {reach}, in {_layers(len(report.layers))} that can be decomposed"),
        Text(_channels(report)),
        *([Text(legend, "dim")] if report.layers else []),
    )


def _channels(report: Analysis) -> str:
    """Which hidden activations may lose channels, in a line."""
    sizes = [one.size for one in report.channels.found]
    reasons = Counter(reason for reason in report.channels.kept.values())
    stay = "; ".join(f"{number}: {reason}" for reason, number in reasons.most_common(4))
    found = f"{len(sizes)} sets, of {min(sizes)} to {max(sizes)} channels" if sizes else "none"
    return f"channels that may go: {found}" + (f"; stay: {stay}" if stay else "")


def fine_tuning(found: FineTuning) -> RenderableType:
    """A fine-tuning as a table: a column for the original, the compressed and the fine-tuned network."""
    table = Listing("", ">original", ">compressed", ">fine-tuned")
    shown = {"top1": "top-1 %", "agreement": "agreement %"}
    measures = (("held-out", found.measure, found.held_out), ("test", found.test_measure, found.test))
    for part, measure, scores in measures:
        if scores:
            table.add_row(f"{part} {shown.get(measure, measure)}", *(f"{score:.2f}" for score in scores))
    for unit in UNITS:
        was, now = getattr(found.plan.before, unit), getattr(found.plan.after, unit)
        table.add_row(unit, f"{was:,}", f"{now:,}", f"{now:,}")
    table.add_row("latency ms", *(f"{one:.2f}" for one in found.latencies_ms))
    last = found.epochs[-1]
    told = f"{len(found.epochs)} epochs, loss {found.epochs[0].loss:.4g} → {last.loss:.4g}, precision {found.precision}"
    return Group(table, Text(told, "dim"), Text(f"{found.out}  ({found.seconds:.0f} s)"))


def exported(found: Exported) -> RenderableType:
    """An exported file, and how to run it."""
    sizes = "any number of examples" if found.free else "batches of two examples alone"
    told = f"{found.folded} batch norms folded; takes {sizes}; outputs differ by {found.difference:.1g} of the largest"
    onnx = found.path.suffix == ".onnx"
    call = f'onnxruntime.InferenceSession("{found.path}")' if onnx else f'torch.export.load("{found.path}").module()'
    times = found.latency_ms
    timed = f"in ONNX Runtime, two examples: {times[0]:.3g} → {times[1]:.3g} ms" if times else ""
    return Group(
        Text(f"{found.path}  ({count(found.bytes)}B)"), Text(told, "dim"), *([Text(timed)] if timed else []), Text(call)
    )


def pretrained(path: Path) -> RenderableType:
    """A directory for transformers, and how it is loaded."""
    size = sum(one.stat().st_size for one in path.iterdir())
    return Group(
        Text(f"{path}  ({count(size)}B)"),
        Text((path / "README.md").read_text().split("```")[1].removeprefix("python\n").strip()),
    )


def demo_row_dict(row: Row) -> dict[str, Any]:
    """A line of the demonstration in JSON's types."""
    return {**vars(row), "cost": row.cost.as_dict()}


def demo(rows: Sequence[Row], seconds: float) -> RenderableType:
    """The demonstration as a table."""
    first = rows[0]
    table = Listing(">MACs asked", "decomposition", ">MACs kept", ">params kept", ">top-1 %", ">latency", ">seconds")
    budget = first.budget
    for row in rows:
        if row.budget != budget:
            table.add_section()
            budget = row.budget
        kept = row.cost.kept(first.cost)
        table.add_row(
            f"{100 * row.budget:.0f} %" if row.budget else "",
            row.decomposition,
            f"{100 * kept['macs']:.1f} %",
            f"{100 * kept['params']:.1f} %",
            f"{row.top1:.2f}",
            f"{row.milliseconds / first.milliseconds:.2f}×",
            f"{row.seconds:.1f}" if row.budget else "",
        )
    whole = f"a CNN of {count(first.cost.params)} parameters and {count(first.cost.macs)} MACs on 360 held-out digits"
    legend = (
        "no data used, nothing fine-tuned; latency: batches of 64, in turns with the original; each saved and loaded"
    )
    return Group(table, Text(f"{whole}; {seconds:.0f} s in all"), Text(legend, "dim"))


def totals(before: Cost, after: Cost) -> RenderableType:
    """Costs before and after as a small table."""
    table = Listing("", ">before", ">after", ">kept")
    for unit, kept in after.kept(before).items():
        table.add_row(unit, f"{getattr(before, unit):,}", f"{getattr(after, unit):,}", f"{100 * kept:.2f} %")
    return table


def skipped(reasons: Mapping[str, str]) -> RenderableType:
    """The skipped layers, those that differ in a number in one row, and a reason that several share told once."""
    if not reasons:
        return Text("no layer was skipped", "dim")
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    table = Listing("@skipped layer", "~reason")
    for reason, alike in names.items():
        for k, label in enumerate(grouped(alike)):
            table.add_row(label, reason if k == 0 else Text("″", "dim"))
    return table


def count(value: int) -> str:
    """A count with three significant digits and a suffix: 40.6 M."""
    number = float(value)
    for suffix in ("", " k", " M", " G"):
        if number < 1000:
            return f"{number:.3g}{suffix}" if suffix else f"{value}"
        number /= 1000
    return f"{number:.3g} T"


def _layers(number: int) -> str:
    return f"{number} layer" if number == 1 else f"{number} layers"
