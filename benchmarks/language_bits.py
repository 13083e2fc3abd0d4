"""Eight and four bits on top of a language model that lost channels: perplexity and bytes of all that can be had.

SmolLM2-135M-Instruct, its widths at 80 % of its blocks' parameters, calibrated on 64 blocks of 512 tokens of
WikiText-2's validation text. Linear layers' weights are quantised by torchao, in eight bits per output or four in
groups of 32 (so widths are multiples of 32), the head, which is tied to the embedding, too. Bytes are those of the
weights: of a group or output one scale of two bytes, of all that is not quantised two bytes each, the tied matrix once.
Scored on 12 evenly spaced blocks of 1,024 tokens of the test text, and of another kind of text (`language.py`).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from common import keep, parser, record, require_data
from language import other_text
from torch import nn
from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_
from units import language, sizes

from rankfold import Budget, study
from rankfold.evaluation import perplexity

GROUP = 32
KEPT = (0.8,)


def quantised(model: nn.Module, bits: int) -> tuple[nn.Module, int]:
    """A copy of a model in so many bits, and the bytes that its weights take."""
    model = copy.deepcopy(model)
    linear = [one for one in model.modules() if isinstance(one, nn.Linear)]
    sizes = {id(one): 2 * one.numel() for one in model.parameters()}
    if bits < 16:
        for one in linear:
            scales = one.weight.numel() // GROUP if bits == 4 else one.out_features
            sizes[id(one.weight)] = one.weight.numel() * bits // 8 + 2 * scales
        kind, granularity = ("int4", PerGroup(GROUP)) if bits == 4 else ("int8", PerAxis(0))
        quantize_(model, IntxWeightOnlyConfig(weight_dtype=getattr(torch, kind), granularity=granularity))
        head: Any = model.get_output_embeddings()  # pyrefly: ignore[not-callable]
        embedding: Any = model.get_input_embeddings()  # pyrefly: ignore[not-callable]
        embedding.weight = nn.Parameter(head.weight.dequantize(), requires_grad=False)  # one matrix, as before
    return model, sum(sizes.values())


def main() -> None:
    """Writes a record of every network in every number of bits."""
    made = parser(__doc__ or "")
    made.add_argument("--language", type=Path, required=True, help="folder of the language model")
    made.add_argument("--rows", type=int, default=64, help="blocks to calibrate on")
    arguments = made.parse_args()
    model, inputs, tested = language(arguments.language, require_data(arguments) / "wikitext2", arguments.rows)
    texts = {"wikitext2": tested, "pydoc": other_text(arguments.language)}
    outside, inside = sizes(model)
    example = {"input_ids": inputs[0]["input_ids"][:1], "use_cache": False}
    budgets = {kept: Budget(params=int(outside + kept * inside)) for kept in KEPT}
    measured = study(
        model,
        example,
        budget=budgets[KEPT[0]],
        decomposition="interpolative",
        calibration=inputs,
        sequential=False,
        align=GROUP,
    )
    networks: dict[float, Any] = {1.0: model} | {kept: measured.compress(one).model for kept, one in budgets.items()}
    for kept, network in networks.items():
        for bits in (16, 8, 4):
            small, size = quantised(network, bits)
            found = {name: perplexity(small, rows) for name, rows in texts.items()}
            keep(
                [
                    record(
                        case=f"{kept}:{bits}",
                        model="SmolLM2-135M-Instruct",
                        blocks_kept=kept,
                        bits=bits,
                        rows=arguments.rows,
                        megabytes=round(size / 1e6, 1),
                        perplexity={name: round(one.value, 2) for name, one in found.items()},
                    )
                ]
            )


if __name__ == "__main__":
    main()
