"""The public surface, and what importing the package costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import rankfold

SOURCE = Path(rankfold.__file__).parent


def test_public_surface():
    assert sorted(rankfold.__all__) == [
        "Analysis", "ArtifactError", "Budget", "BudgetError", "Cost", "DataError", "LayerPlan", "ModelError", "Plan",
        "PlanError", "RankfoldError", "Result", "SearchError", "Study", "TrainingError", "UnknownNameError", "analyze", "compress", "compress_files", "load", "load_plan", "plan_of", "save",
        "save_pretrained", "study",
    ]  # fmt: skip
    assert all(hasattr(rankfold, name) for name in rankfold.__all__)


def fresh(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_loads_no_optional_package_and_has_no_side_effects():
    heavy = ("torchvision", "timm", "transformers", "onnx", "matplotlib", "sklearn", "PIL", "torch._dynamo", "pandas")
    code = (
        "import sys, torch; state = torch.random.get_rng_state(); threads = torch.get_num_threads(); dtype = torch.get_default_dtype()\n"
        "import rankfold\n"
        "assert torch.equal(state, torch.random.get_rng_state()) and threads == torch.get_num_threads()\n"
        f"assert dtype == torch.get_default_dtype(); print([name for name in {heavy!r} if name in sys.modules])"
    )
    assert fresh(code).strip() == "[]"


def test_files_stay_readable():
    long = {path.name: count for path in SOURCE.rglob("*.py") if (count := len(path.read_text().splitlines())) > 350}
    assert not long


def test_nothing_is_unpickled():
    for path in SOURCE.rglob("*.py"):
        text = path.read_text()
        assert "pickle.load" not in text
        assert "allow_pickle=True" not in text
        assert "weights_only=False" not in text
