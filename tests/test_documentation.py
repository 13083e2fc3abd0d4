"""The documentation: what tutorials show runs, what pages link to is there, and every page can be reached."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

from rankfold.sources.models import optional

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("path", sorted((DOCS / "tutorials").glob("*.md")), ids=lambda path: path.stem)
def test_tutorials_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    content = path.read_text(encoding="utf-8")
    for package, extra in (("timm", "timm"), ("transformers", "hf")):
        if f"import {package}\n" in content:
            optional(package, extra)
    parts = re.split(r"^```python\n(.*?)^```$", content, flags=re.DOTALL | re.MULTILINE)
    names: dict[str, object] = {"__name__": "tutorial"}
    for place in range(1, len(parts), 2):
        line = "".join(parts[:place]).count("\n") + place
        code = "\n" * line + parts[place]  # so that a traceback names the line
        exec(compile(code, str(path), "exec"), names)
    assert "rankfold" in names
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda path: path.stem)
def test_what_is_linked_to_is_there(path: Path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    links = [link for link in LINK.findall(text) if "://" not in link]
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"[\w/-]+\.md", str(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])))
    assert listed == {str(page.relative_to(DOCS)) for page in PAGES}
