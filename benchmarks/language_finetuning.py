"""Fine-tuning of a language model on plain text, taught by its original: which rate, and what half an hour gives.

SmolLM2-135M-Instruct, its widths at 80 % of its blocks' parameters, calibrated and then trained on WikiText-2's
validation text in steps of two blocks of 512 tokens. A case is OPTIMISER:RATE:STEPS, with :unlabelled without the loss
of the next token, so that the original's distributions are all that it learns from. The last 24 blocks are held out:
settings are compared by the perplexity on them; of the test text and another kind of text (`language.py`) 12 evenly
spaced blocks of 1,024 tokens are scored.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from common import keep, parser, record, require_data
from language import METHODS, other_text
from units import language, sizes

from rankfold import Budget, compress
from rankfold.evaluation import perplexity
from rankfold.sources.text import TextData
from rankfold.training import Losses, Training, fine_tune

KEPT = 0.8
HELD, BLOCKS = 24, 460
"""Blocks that are held out, and all there are."""
TEMPERATURE = 1.0
BATCH = 2
RATES = ("sgd:0.003", "sgd:0.03", "adamw:1e-5", "adamw:1e-4", "adamw:1e-3")
CASES = (*(f"{rate}:8" for rate in RATES), "adamw:1e-4:8:unlabelled")


def main() -> None:
    """Writes a record of every case, or of those asked for."""
    made = parser(__doc__ or "")
    made.add_argument("--language", type=Path, required=True, help="folder of the language model")
    made.add_argument("--only", action="append", help="OPTIMISER:RATE:STEPS (repeatable)")
    made.add_argument("--device", default="cpu")
    arguments = made.parse_args()
    model, inputs, tested = language(arguments.language, require_data(arguments) / "wikitext2", BLOCKS)
    model.to(arguments.device)
    texts = {"wikitext2": tested, "pydoc": other_text(arguments.language)}
    outside, inside = sizes(model)
    example = {"input_ids": inputs[0]["input_ids"][:1], "use_cache": False}
    budget = Budget(params=int(outside + KEPT * inside))
    result = compress(model, example, budget=budget, calibration=inputs[:32], **METHODS["widths"])
    rows = torch.cat([batch["input_ids"] for batch in inputs])
    before = {name: round(perplexity(result.model, text).value, 2) for name, text in texts.items()}
    held = round(perplexity(result.model, rows[-HELD:]).value, 2)
    for case in arguments.only or CASES:
        optimiser, rate, steps, *unlabelled = case.split(":")
        start = time.perf_counter()
        trained = fine_tune(
            result.model,
            TextData(rows[:-HELD][: BATCH * int(steps)]),
            teacher=model,
            plan=result.plan,
            training=Training(
                epochs=1, batch_size=BATCH, optimiser=optimiser, rate=float(rate), weight_decay=0.0, precision="no"
            ),
            losses=Losses(task=0.0 if unlabelled else 1.0, temperature=TEMPERATURE),
        )
        seconds = time.perf_counter() - start
        keep(
            [
                record(
                    case=case,
                    model="SmolLM2-135M-Instruct",
                    blocks_kept=KEPT,
                    optimiser=optimiser,
                    rate=float(rate),
                    labels=not unlabelled,
                    steps=int(steps),
                    tokens=int(steps) * BATCH * rows.shape[1],
                    held_out=[held, round(perplexity(trained.model, rows[-HELD:]).value, 2)],
                    perplexity={
                        name: [before[name], round(perplexity(trained.model, text).value, 2)]
                        for name, text in texts.items()
                    },
                    seconds=round(seconds, 1),
                    device=torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu",
                )
            ]
        )


if __name__ == "__main__":
    main()
