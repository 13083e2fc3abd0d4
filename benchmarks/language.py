"""A language model at several sizes, by several methods: perplexity on two texts, tokens per second, time and memory.

SmolLM2-135M-Instruct is calibrated on 128 blocks of 512 tokens of WikiText-2's validation text, without training, and
scored on 12 evenly spaced blocks of 1,024 tokens of its test text, and of a text of another kind, Python's own
reference as `pydoc` has it. A case is METHOD:KEPT, METHOD:KEPT:EPOCHS or METHOD:KEPT:EPOCHS:INPUTS, with the share of
the parameters kept of what is neither embedding nor head, epochs of refining by blocks (`2`) and of distilling the
whole (`0+1`), and what it is calibrated on: the validation text (`valid`), tokens that the model writes itself
(`written`), half of each (`mixed`), another share written (`0.67`), or tokens at random (`random`). `--every-block`
scores all blocks of the test text as well, `--device cuda` runs everything on a GPU, where tokens per second are not
measured.

`uniform` is the low-rank baseline of published work: matrices whitened by the moment of what goes into them, the same
fraction everywhere (SVD-LLM, arXiv 2403.07378); `uniform_in_order` fits them in forward order to what the ones before
pass on, as its sequential update does. `energy` gives every matrix the same share of its energy in the metric, after
ASVD (arXiv 2312.05821). `uniform_widths` takes the same width in every layer, which the ordinary class of transformers
loads without rankfold; `embedding_too` lets the embedding, to which the head is tied, have a low rank as well, within
as many parameters in all.
"""

from __future__ import annotations

import resource
import time
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from common import keep, parser, record, require_data
from torch import Tensor
from units import blocks, language, sizes

from rankfold import Budget, study
from rankfold.calibration import Refining
from rankfold.calibration.tokens import random_rows, with_written, written_rows
from rankfold.evaluation import perplexity, speeds
from rankfold.progress import silent

METHODS: dict[str, dict[str, Any]] = {
    "uniform": {"decomposition": "svd", "search": "uniform", "sequential": False},
    "uniform_in_order": {"decomposition": "svd", "search": "uniform"},
    "energy": {"decomposition": "svd", "search": "energy", "sequential": False},
    "svd": {"decomposition": "svd", "sequential": False},
    "widths": {"decomposition": "interpolative", "sequential": False},
    "uniform_widths": {"decomposition": "interpolative", "search": "uniform", "sequential": False},
    "embedding_too": {
        "decomposition": {"*mlp*": "interpolative", "*embed_tokens": "svd"},
        "include": ["*"],
        "sequential": False,
    },
    "both": {"decomposition": ["svd", "interpolative"], "sequential": False},
    "both_in_order": {"decomposition": ["svd", "interpolative"]},
}
"""Options of `rankfold.compress`, by the name of a method."""
KEPT = (0.9, 0.8, 0.7, 0.6)
EVERY = (
    *(f"{method}:{kept}" for method in METHODS for kept in KEPT),
    *(f"widths:{kept}:2" for kept in KEPT),
    *(f"widths:{kept}:0+1:{inputs}" for inputs in ("valid", "mixed") for kept in KEPT),
    *(f"widths:{kept}:0:{inputs}" for inputs in ("written", "mixed", "random") for kept in KEPT),
)
IN_STEP = 4
"""Blocks in a step of refining: each is as many targets as it has tokens."""


def parts(case: str) -> tuple[str, str, str, str]:
    """A case's method, share kept, epochs (by blocks, and of the whole behind a plus) and inputs."""
    method, kept, epochs, inputs = (case.split(":") + ["0", "valid"][case.count(":") - 1 :])[:4]
    return method, kept, epochs, inputs


def calibration(kind: str, model: Any, valid: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Batches of tokens of some kind, as many as there are of the validation text."""
    text = torch.cat([batch["input_ids"] for batch in valid])
    example, vocabulary = text[:1], model.config.vocab_size
    if kind == "random":
        text = random_rows(example, vocabulary, len(text))
    elif kind == "written":
        text = written_rows(model, example, vocabulary, len(text))
    elif kind != "valid":
        text = with_written(model, text, 0.5 if kind == "mixed" else float(kind))
    return [{"input_ids": part, "use_cache": False} for part in text.split(4)]


def other_text(folder: Path) -> Tensor:
    """Blocks of a text of another kind."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    whole = "\n\n".join(topics[name] for name in sorted(topics))
    return blocks(tokenizer(whole, return_tensors="pt").input_ids[0], 1024, 12)


def main() -> None:
    """Writes the records of all cases, or of those asked for."""
    made = parser(__doc__ or "")
    made.add_argument("--language", type=Path, required=True, help="folder of the language model")
    made.add_argument("--only", action="append", help="a case (repeatable)")
    made.add_argument("--rows", type=int, default=128, help="blocks to calibrate on")
    made.add_argument("--every-block", action="store_true", help="score all blocks of the test text, too")
    made.add_argument("--device", default="cpu")
    given = made.parse_args()
    model, valid, tested = language(given.language, require_data(given) / "wikitext2", given.rows)
    model.to(given.device)
    texts = {"wikitext2": tested, "pydoc": other_text(given.language)}
    if given.every_block:
        texts["wikitext2, all blocks"] = every_block(given.language, require_data(given) / "wikitext2")
    base = {name: perplexity(model, rows) for name, rows in texts.items()}
    outside, inside = sizes(model)
    for (method, kind), cases in groupby(given.only or EVERY, key=lambda case: parts(case)[::3]):
        budgets = {case: Budget(params=int(outside + float(parts(case)[1]) * inside)) for case in cases}
        start = time.perf_counter()
        inputs = calibration(kind, model, valid)
        making = time.perf_counter() - start
        example = {"input_ids": inputs[0]["input_ids"][:1], "use_cache": False}
        first = next(iter(budgets.values()))
        measured = study(model, example, budget=first, calibration=inputs, **METHODS[method])
        for case, budget in budgets.items():
            epochs, _, distilled = parts(case)[2].partition("+")
            refining = Refining(int(epochs), batch_size=IN_STEP)
            recovery = replace(measured.recovery, refining=refining, distilling=int(distilled or 0))
            result = replace(measured, recovery=recovery).compress(budget, progress=silent)
            found = {name: perplexity(result.model, rows) for name, rows in texts.items()}
            timed = None if model.device.type == "cuda" else speeds((model, result.model), tested)
            gained = [[one.prompt, one.written] for one in timed or ()]
            entry = record(
                case=case,
                method=method,
                inputs=kind,
                epochs=int(epochs),
                distilled=int(distilled or 0),
                model="SmolLM2-135M-Instruct",
                rows=given.rows,
                blocks_kept=round((result.after.params - outside) / inside, 4),
                perplexity={name: round(one.value, 2) for name, one in found.items()},
                base_perplexity={name: round(one.value, 2) for name, one in base.items()},
                nats_lost={name: round(one.loss - base[name].loss, 4) for name, one in found.items()},
                speed_kept=[round(own / was, 3) for was, own in zip(*gained, strict=True)] if gained else None,
                seconds=round(result.seconds, 1),
                making_seconds=round(making, 1),
                peak_gb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
                device=torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu",
            )
            keep([entry])


def every_block(folder: Path, text: Path) -> Tensor:
    """All blocks of 1,024 tokens of the test text."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    whole = tokenizer((text / "test.txt").read_text(), return_tensors="pt").input_ids[0]
    return whole[: len(whole) // 1024 * 1024].view(-1, 1024)


if __name__ == "__main__":
    main()
