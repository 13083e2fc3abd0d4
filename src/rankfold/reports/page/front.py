"""Several results on one page: what each costs, and what it scored, on whatever data all of them were scored with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from rankfold.errors import ArtifactError
from rankfold.files.artifact import load_evaluations, load_metrics, load_plan
from rankfold.reports.page.pictures import Spot, number, spots

COSTS = {"macs": "MACs", "params": "parameters"}


def front_of(directories: Sequence[str | Path]) -> dict[str, Any]:
    """What the page of several saved models is filled with; raises ArtifactError where there are fewer than two."""
    if len(directories) < 2:
        raise ArtifactError("one result has its own page; give two directories or more to compare")
    plans = [load_plan(one) for one in directories]
    scored = [load_evaluations(one) for one in directories]
    common = [data for data in scored[0] if all(data in one for one in scored)]
    names = _names(directories)
    rows: list[dict[str, Any]] = []
    drawn: list[tuple[str, Markup]] = []
    for name, directory, plan, scores in zip(names, directories, plans, scored, strict=True):
        times = load_metrics(directory).get("latency_ms", {})
        rows.append(
            {
                "name": name,
                "costs": [(number(getattr(plan.after, one)), plan.after.kept(plan.before)[one]) for one in COSTS],
                "latency": times["compressed"] / max(times["original"], 1e-9) if times else None,
                "scores": [_score(scores[data], "compressed") for data in common],
                "made": _made(plan.settings),
            }
        )
    for data in common:
        title, _, before = _score(scored[0][data], "original")
        for unit, what in COSTS.items():
            found = [
                Spot(name, 100 * plan.after.kept(plan.before)[unit], _score(one[data], "compressed")[2])
                for name, plan, one in zip(names, plans, scored, strict=True)
            ]
            whole = [Spot("original", 100.0, before)] if before is not None else []
            about = f"{title} on {data} over {what} kept"
            drawn.append((about, spots(about, [*found, *whole], f"{what} kept, %", title)))
    heads = [f"{_score(scored[0][data], 'compressed')[0]}, {data.rpartition('/')[2]}" for data in common]
    return {"rows": rows, "heads": heads, "costs": list(COSTS.values()), "pictures": drawn}


def _names(directories: Sequence[str | Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    paths = [Path(one).absolute().parts for one in directories]
    for count in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-count:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [str(one) for one in directories]


def _score(found: Mapping[str, Any], side: str) -> tuple[str, str, float | None]:
    """What an evaluation measured, and its value as text and as a number."""
    measures = (("perplexity", "perplexity"), ("spearman", "Spearman %"), ("top1", "top-1 %"))
    for key, title in measures:
        if key in found[side]:
            value = found[side][key]
            return title, "–" if value is None else f"{value:.2f}", value
    return "score", "–", None


def _made(settings: Mapping[str, Any]) -> str:
    """How a result was made, in a few words."""
    given = settings.get("decomposition", "")
    names = given if isinstance(given, str) else ", ".join(f"{one}" for one in given)
    budget = ", ".join(f"{unit} {limit}" for unit, limit in settings.get("budget", {}).items())
    tuned = ", fine-tuned" if settings.get("fine_tunings") else ""
    return f"{names}; {budget}{tuned}"
