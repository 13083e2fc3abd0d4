"""The table of searches. Adding one is a function from `Problem` to `Selection` and one line here."""

from __future__ import annotations

from rankfold.errors import UnknownNameError
from rankfold.search.baselines import energy, uniform
from rankfold.search.exact import exact
from rankfold.search.problem import Problem, Search, Selection

__all__ = ["SEARCHES", "Problem", "Search", "Selection", "search"]

SEARCHES: dict[str, Search] = {"exact": exact, "uniform": uniform, "energy": energy}


def search(name: str) -> Search:
    """The search called `name`; raises UnknownNameError, with the nearest names, where there is none."""
    if name not in SEARCHES:
        raise UnknownNameError("search", name, SEARCHES)
    return SEARCHES[name]
