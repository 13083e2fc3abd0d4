"""What a compressed model scored beside its original, as tables for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from rankfold.budget import UNITS
from rankfold.reports.comparison import Comparison, LanguageComparison, Side, SimilarityComparison, SimilaritySide
from rankfold.reports.layout import Listing


def comparison(report: Comparison | LanguageComparison | SimilarityComparison) -> RenderableType:
    """A comparison as a table with a ratio per row."""
    if isinstance(report, LanguageComparison):
        return _on_text(report)
    return _on_pairs(report) if isinstance(report, SimilarityComparison) else _on_labels(report)


def _on_labels(report: Comparison) -> RenderableType:
    original, compressed = report.original, report.compressed
    table = Listing("", ">original", ">compressed", ">compressed / original")
    if original.accuracy and compressed.accuracy:
        for name in ("top1", "top5"):
            was, now = getattr(original.accuracy, name), getattr(compressed.accuracy, name)
            table.add_row(f"top-{name[-1]} %", f"{was:.2f}", f"{now:.2f}", f"{now - was:+.2f} points")
    elif compressed.accuracy:
        table.add_row("top-1 %", "not scored", f"{compressed.accuracy.top1:.2f}", "")
        table.add_row("top-5 %", "not scored", f"{compressed.accuracy.top5:.2f}", "")
    for unit in UNITS:
        was, now = getattr(original.cost, unit), getattr(compressed.cost, unit)
        table.add_row(unit, f"{was:,}", f"{now:,}", f"{now / max(was, 1):.3f}")
    table.add_row("latency ms", *_latencies(original, compressed))
    notes = f"{report.examples:,} examples; latency: median of a batch of one, in turns; normalisation: "
    return Group(table, Text(notes + report.normalisation.source, "dim"))


def _on_text(report: LanguageComparison) -> RenderableType:
    original, compressed, blocks = report.original, report.compressed, report.blocks
    table = Listing("", ">original", ">compressed", ">compressed / original")
    rows = [("perplexity", original.perplexity.value, compressed.perplexity.value, ".2f")]
    rows += [(unit, getattr(original.cost, unit), getattr(compressed.cost, unit), ",") for unit in UNITS]
    if original.speed and compressed.speed:
        rows.append(("tokens/s, prompt", original.speed.prompt, compressed.speed.prompt, ".1f"))
        rows.append(("tokens/s, written", original.speed.written, compressed.speed.written, ".1f"))
    _add_ratios(table, rows)
    notes = (
        f"{len(blocks.rows):,} blocks of {blocks.rows.shape[1]:,} tokens, one every {blocks.stride:,} of "
        f"{blocks.tokens:,}; speed: a batch of one, with a cache, median of rounds in turns"
    )
    return Group(table, Text(notes, "dim"))


def _on_pairs(report: SimilarityComparison) -> RenderableType:
    original, compressed = report.original, report.compressed
    table = Listing("", ">original", ">compressed", ">compressed / original")
    was, now = original.similarity, compressed.similarity
    table.add_row(
        "Spearman %", f"{was.spearman:.2f}", f"{now.spearman:.2f}", f"{now.spearman - was.spearman:+.2f} points"
    )
    _add_ratios(table, [(unit, getattr(original.cost, unit), getattr(compressed.cost, unit), ",") for unit in UNITS])
    table.add_row("latency ms", *_latencies(original, compressed))
    notes = f"{was.pairs:,} pairs of sentences; latency: median of the longest sentence, in turns"
    return Group(table, Text(notes, "dim"))


def _add_ratios(table: Listing, rows: Sequence[tuple[str, float, float, str]]) -> None:
    """Rows of a name, two numbers in their form, and the second over the first."""
    for name, was, now, form in rows:
        table.add_row(name, format(was, form), format(now, form), f"{now / max(was, 1e-12):.3f}")


def _latencies(original: Side | SimilaritySide, compressed: Side | SimilaritySide) -> tuple[str, str, str]:
    ratio = compressed.latency_ms / original.latency_ms
    return f"{original.latency_ms:.2f}", f"{compressed.latency_ms:.2f}", f"{ratio:.3f}"
