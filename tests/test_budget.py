from __future__ import annotations

import pytest

from rankfold import Budget, BudgetError, Cost, UnknownNameError
from rankfold.budget import describe

ORIGINAL = Cost(1000, 50_000, 4000)


@pytest.mark.parametrize(
    ("given", "limit"),
    [
        ({"macs": 0.5}, 25_000),
        ({"macs": "50%"}, 25_000),
        ({"macs": "0.5"}, 25_000),
        ({"macs": 300}, 300),
        ({"macs": "300"}, 300),
        ({"macs": "1.5k"}, 1500),
        ({"params": "300M"}, 300_000_000),
        ({"bytes": "12MB"}, 12_000_000),
        ({"bytes": "2 KiB"}, 2048),
        ({"params": 1.0}, 1000),
    ],
)
def test_limits(given: dict, limit: int):
    assert list(Budget(**given).limits(ORIGINAL).values()) == [limit]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"macs": 0.0},
        {"macs": -0.1},
        {"macs": 1.5},
        {"macs": 0},
        {"macs": -3},
        {"macs": "abc"},
        {"macs": "12MB"},
        {"macs": True},
        {"macs": "150%"},
        {"macs": float("nan")},
        {"bytes": "3 parsecs"},
    ],
)
def test_what_is_no_budget_is_refused(given: dict):
    with pytest.raises(BudgetError):
        Budget(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"error": 0.0}, "not between 0 and 1"),
        ({"error": 1.5}, "not between 0 and 1"),
        ({"error": "much"}, "not a number"),
        ({"macs": 0.5, "minimise": "params"}, "needs a limit on the error"),
    ],
)
def test_what_is_no_limit_on_the_error_is_refused(given: dict, message: str):
    with pytest.raises(BudgetError, match=message):
        Budget(**given)


def test_a_limit_on_the_error_says_what_is_minimised():
    assert Budget(error=0.05).minimised == "macs"
    assert Budget(macs=0.5).minimised == "error"
    budget = Budget.parse(["error=0.05", "minimise=params", "macs=0.5"])
    assert (budget.largest_error, budget.minimised, budget.units) == (0.05, "params", ("params", "macs"))
    assert budget.limits(ORIGINAL) == {"macs": 25_000}
    with pytest.raises(UnknownNameError, match="nearest: params"):
        Budget(error=0.05, minimise="parms")


def test_texts_of_the_command_line():
    assert Budget.parse(["macs=0.5", "params = 300k"]) == Budget(macs="0.5", params="300k")
    with pytest.raises(UnknownNameError, match="nearest: params"):
        Budget.parse(["parms=0.5"])
    with pytest.raises(BudgetError, match="twice"):
        Budget.parse(["macs=0.5", "macs=0.4"])
    with pytest.raises(BudgetError, match="UNIT=LIMIT"):
        Budget.parse(["macs"])


def test_a_described_budget_can_be_given_back():
    text = describe({"macs": 12_345}, ORIGINAL)
    assert Budget.parse([text.split(" ")[0]]).limits(ORIGINAL)["macs"] >= 12_345
