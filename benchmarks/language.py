"""A language model at several sizes, by several methods: perplexity on two texts, tokens per second, time and memory.

SmolLM2-135M-Instruct is calibrated on 128 blocks of 512 tokens of WikiText-2's validation text, without training, and
scored on 12 evenly spaced blocks of 1,024 tokens of its test text, and of a text of another kind, Python's own
reference as `pydoc` has it. A case is METHOD:KEPT or METHOD:KEPT:EPOCHS, with the share of the parameters kept of what
is neither embedding nor head, and epochs of refining by blocks.

`uniform` is the low-rank baseline of published work: matrices whitened by the moment of what goes into them, the same
fraction everywhere (SVD-LLM, arXiv 2403.07378); `uniform_in_order` fits them in forward order to what the ones before
pass on, as its sequential update does. `energy` gives every matrix the same share of its energy in the metric, after
ASVD (arXiv 2312.05821).
"""

from __future__ import annotations

import resource
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from common import keep, parser, record, require_data
from torch import Tensor
from units import blocks, language, sizes

from rankfold import Budget, study
from rankfold.evaluation import perplexity, speeds
from rankfold.progress import silent

METHODS: dict[str, dict[str, Any]] = {
    "uniform": {"decomposition": "svd", "search": "uniform", "sequential": False},
    "uniform_in_order": {"decomposition": "svd", "search": "uniform"},
    "energy": {"decomposition": "svd", "search": "energy", "sequential": False},
    "svd": {"decomposition": "svd", "sequential": False},
    "widths": {"decomposition": "interpolative", "sequential": False},
    "both": {"decomposition": ["svd", "interpolative"], "sequential": False},
    "both_in_order": {"decomposition": ["svd", "interpolative"]},
}
"""Options of `rankfold.compress`, by the name of a method."""
KEPT = (0.9, 0.8, 0.7, 0.6)


def other_text(folder: Path) -> Tensor:
    """Blocks of a text of another kind."""
    from transformers import AutoTokenizer

    whole = "\n\n".join(topics[name] for name in sorted(topics))
    return blocks(AutoTokenizer.from_pretrained(folder)(whole, return_tensors="pt").input_ids[0], 1024, 12)


def main() -> None:
    """Writes the records of all cases, or of those asked for."""
    made = parser(__doc__ or "")
    made.add_argument("--language", type=Path, required=True, help="folder of the language model")
    made.add_argument("--only", action="append", help="a case (repeatable)")
    made.add_argument("--rows", type=int, default=128, help="blocks to calibrate on")
    arguments = made.parse_args()
    text = require_data(arguments) / "wikitext2"
    every = [f"{method}:{kept}" for method in METHODS for kept in KEPT]
    model, inputs, tested = language(arguments.language, text, arguments.rows)
    texts = {"wikitext2": tested, "pydoc": other_text(arguments.language)}
    base = {name: perplexity(model, rows) for name, rows in texts.items()}
    outside, inside = sizes(model)
    for method, cases in groupby(arguments.only or every, key=lambda case: case.split(":")[0]):
        budgets = {case: Budget(params=int(outside + float(case.split(":")[1]) * inside)) for case in cases}
        example = {"input_ids": inputs[0]["input_ids"][:1], "use_cache": False}
        first = next(iter(budgets.values()))
        measured = study(model, example, budget=first, calibration=inputs, **METHODS[method])
        for case, budget in budgets.items():
            epochs = int([*case.split(":"), "0"][2])
            result = replace(measured, refine=epochs).compress(budget, progress=silent)
            found = {name: perplexity(result.model, rows) for name, rows in texts.items()}
            timed = speeds((model, result.model), tested)
            gained = [[one.prompt, one.written] for one in timed or ()]
            entry = record(
                case=case,
                method=method,
                epochs=epochs,
                model="SmolLM2-135M-Instruct",
                rows=arguments.rows,
                blocks_kept=round((result.after.params - outside) / inside, 4),
                perplexity={name: round(one.value, 2) for name, one in found.items()},
                base_perplexity={name: round(one.value, 2) for name, one in base.items()},
                nats_lost={name: round(one.loss - base[name].loss, 4) for name, one in found.items()},
                speed_kept=[round(own / was, 3) for was, own in zip(*gained, strict=True)] if gained else None,
                seconds=round(result.seconds, 1),
                peak_gb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
            )
            keep([entry])


if __name__ == "__main__":
    main()
