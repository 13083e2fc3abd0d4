"""A model larger than memory, from files to files: a random Llama in bfloat16, its time and the memory that it took.

`--layers` and `--width` give the model; 48 layers have 3.2 billion parameters. It is written to a folder of the
system's for temporary files first, a block at a time, and compressed in a process of its own, whose memory is watched.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from common import keep, record
from safetensors.torch import save_file

VOCABULARY = 128_256
RUN = """
import json, sys, time, torch
import rankfold
from rankfold.files.by_blocks import compress_files

start, stages = time.perf_counter(), {}
def report(what, done, total, note="", /):
    stages.setdefault(what, [time.perf_counter() - start, 0.0])[1] = time.perf_counter() - start
rows = torch.randint(int(sys.argv[3]), (int(sys.argv[4]), 256), generator=torch.Generator().manual_seed(0))
budget = rankfold.Budget(params=0.7)
plan = compress_files(
    sys.argv[1], sys.argv[2], budget=budget, calibration=rows.split(1), memory="2GB", progress=report
)
print(json.dumps({
    "seconds": time.perf_counter() - start,
    "stages": {name: end - begun for name, (begun, end) in stages.items()},
    "before": plan.before.params, "after": plan.after.params, "decomposed": len(plan.decomposed),
}))
"""


def written(folder: Path, layers: int, width: int) -> dict[str, int]:
    """Writes a random Llama, and returns its sizes."""
    sizes = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 256,
        "head_dim": 64,
    }
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "torch_dtype": "bfloat16",
        "vocab_size": VOCABULARY, "tie_word_embeddings": True, "max_position_embeddings": 4096, **sizes,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator, places = torch.Generator().manual_seed(0), {}
    small = width // 4
    shapes = {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (small, width), "self_attn.v_proj": (small, width),
        "self_attn.o_proj": (width, width), "mlp.gate_proj": (4 * width, width), "mlp.up_proj": (4 * width, width),
        "mlp.down_proj": (width, 4 * width),
    }  # fmt: skip
    for number in range(layers + 1):
        if number == layers:
            state = {"model.embed_tokens.weight": _random(generator, VOCABULARY, width, scale=1.0)}
            state["model.norm.weight"] = torch.ones(width, dtype=torch.bfloat16)
        else:
            prefix = f"model.layers.{number}."
            state = {f"{prefix}{name}.weight": _random(generator, *shape) for name, shape in shapes.items()}
            for name in ("input_layernorm", "post_attention_layernorm"):
                state[f"{prefix}{name}.weight"] = torch.ones(width, dtype=torch.bfloat16)
        file = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(state, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(state, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return sizes


def _random(generator: torch.Generator, rows: int, columns: int, scale: float | None = None) -> torch.Tensor:
    """Random numbers whose singular values fall, as those of trained weights do."""
    made = torch.randn(rows, columns, generator=generator)
    if scale is None:
        made *= torch.linspace(1, 0.05, columns) ** 2
        scale = 1.5 / columns**0.5
    return (scale * made).to(torch.bfloat16)


def watched(process: subprocess.Popen[str]) -> dict[str, float]:
    """The most memory that a process took, in gigabytes: its own, and with pages of files that it had mapped."""
    most = {"anonymous": 0.0, "resident": 0.0}
    fields = {"RssAnon": "anonymous", "VmRSS": "resident"}

    def look() -> None:
        while process.poll() is None:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                return
            for line in lines:
                name, _, value = line.partition(":")
                if name in fields:
                    most[fields[name]] = max(most[fields[name]], int(value.split()[0]) / 2**20)
            time.sleep(0.05)

    threading.Thread(target=look, daemon=True).start()
    return most


def main() -> None:
    """Writes a model, compresses it, loads nothing of it at once, and keeps the record."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--layers", type=int, default=16)
    made.add_argument("--width", type=int, default=2048)
    made.add_argument("--rows", type=int, default=16, help="calibration rows of 256 tokens")
    made.add_argument("--folder", type=Path, help="where the models are written; a temporary folder by default")
    given = made.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        source, target = Path(folder) / "whole", Path(folder) / "small"
        written(source, given.layers, given.width)
        command = [sys.executable, "-c", RUN, str(source), str(target), str(VOCABULARY), str(given.rows)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        most = watched(process)
        output, _ = process.communicate()
        told: dict[str, Any] = json.loads(output.splitlines()[-1])
        size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    keep(
        [
            record(
                case=f"llama {given.layers} × {given.width}",
                layers=given.layers,
                width=given.width,
                tokens=256 * given.rows,
                params=told["before"],
                params_kept=round(told["after"] / told["before"], 4),
                decomposed=told["decomposed"],
                gigabytes_written=round(size / 1e9, 2),
                seconds=round(told["seconds"], 1),
                measuring=round(told["stages"].get("measuring blocks", 0.0), 1),
                fitting=round(told["stages"].get("fitting blocks", 0.0), 1),
                peak_gb=round(most["anonymous"], 2),
                peak_with_mapped_gb=round(most["resident"], 2),
            )
        ]
    )


if __name__ == "__main__":
    main()
