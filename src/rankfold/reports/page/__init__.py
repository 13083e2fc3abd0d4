"""What was done to a network, as one page: a file of its own, with its pictures in it, that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankfold.files.artifact import (
    load_curves,
    load_evaluations,
    load_metrics,
    load_pictures,
    load_plan,
    load_trace,
    write_text,
)
from rankfold.reports.page.content import content_of
from rankfold.reports.page.front import front_of

NAME = "report.html"
"""The page's name in a saved model's directory."""


def write_page(directory: str | Path, out: str | Path | None = None) -> Path:
    """Writes the page of the model saved in `directory`, beside it or to `out`, and returns its path.

    Raises ArtifactError where the directory is not a sound saved model, or the page cannot be written.
    """
    plan = load_plan(directory)
    content = content_of(
        plan,
        load_metrics(directory),
        load_evaluations(directory),
        load_trace(directory),
        load_curves(directory),
        load_pictures(directory),
    )
    return _written("page.html", content, Path(out) if out is not None else Path(directory) / NAME)


def write_front(directories: Sequence[str | Path], out: str | Path) -> Path:
    """Writes a page that compares several saved models, and returns its path; raises ArtifactError as `write_page`."""
    return _written("front.html", front_of(directories), Path(out))


def _written(template: str, content: Mapping[str, Any], target: Path) -> Path:
    """Fills a template and puts it in its place in one step."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = Environment(
        loader=PackageLoader("rankfold.reports.page", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = templates.get_template(template).render(content)
    write_text(target, text)
    return target
