"""The table of searches. Adding one is a function from `Problem` to `Selection` and one line here."""

from __future__ import annotations

from rankfold.errors import UnknownNameError
from rankfold.search.baselines import energy, greedy, uniform
from rankfold.search.evbmf import evbmf
from rankfold.search.exact import exact
from rankfold.search.objective import Objective, Reconstruction
from rankfold.search.problem import Problem, Search, Selection
from rankfold.search.rene import Rene
from rankfold.search.settle import settle

__all__ = ["SEARCHES", "Objective", "Problem", "Reconstruction", "Rene", "Search", "Selection", "search", "settle"]

SEARCHES: dict[str, Search] = {
    "exact": exact,
    "rene": Rene(),
    "uniform": uniform,
    "energy": energy,
    "greedy": greedy,
    "evbmf": evbmf,
}


def search(name: str) -> Search:
    """The search called `name`; raises UnknownNameError, with the nearest names, where there is none."""
    if name not in SEARCHES:
        raise UnknownNameError("search", name, SEARCHES)
    return SEARCHES[name]
