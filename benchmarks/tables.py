"""Makes the documentation's tables from the newest records of every benchmark: README.md and docs/results.md."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def newest(name: str) -> list[dict[str, Any]]:
    """The records of a benchmark's latest run; none where it was not run."""
    paths = sorted(RESULTS.glob(f"{name}-*.json"))
    records: list[dict[str, Any]] = json.loads(paths[-1].read_text()) if paths else []
    return records


def gathered(name: str) -> list[dict[str, Any]]:
    """The latest record of every case of a benchmark, from all its runs."""
    records = {}
    for path in sorted(RESULTS.glob(f"{name}-*.json")):
        records.update({one["case"]: one for one in json.loads(path.read_text())})
    return list(records.values())


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, the first column flush left."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def accuracies(records: list[dict[str, Any]]) -> str:
    """Accuracy records as a table."""
    header = ["method", "top-1 %", "base", "MACs kept", "parameters kept", "seconds", "latency"]
    rows = [
        [
            one["method"],
            f"{one['top1']:.2f}",
            f"{one['base_top1']:.2f}",
            f"{100 * one['macs_kept']:.1f} %",
            f"{100 * one['params_kept']:.1f} %",
            f"{one['seconds']:.1f}",
            f"{one['latency_ratio_batch64']:.2f}×" if "latency_ratio_batch64" in one else "–",
        ]
        for one in records
    ]
    return table(header, rows)


def source(records: list[dict[str, Any]]) -> str:
    """The data of records, and the script that made them, in a line; the records themselves have its options."""
    sets = dict.fromkeys(f"{one['data']}, {one['examples']:,} images" for one in records if "examples" in one)
    dates = " and ".join(sorted({record["date"] for record in records}))
    machine = Counter(record["machine"] for record in records).most_common(1)[0][0]
    script = f"`{' '.join(records[0]['command'].split()[:2])}`, {dates}, {machine}."
    return "; ".join([*sets, script])


def choices() -> str:
    """Accuracy by balance and fit, a row per network and choice, a column per budget."""
    records = newest("tucker_choices")
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for one in records:
        budget = f"{round(100 * one['macs_kept'], -1):.0f} %"
        cells.setdefault((one["model"], one["method"]), {})[budget] = f"{one['top1']:.1f}"
    budgets = ["70 %", "60 %", "50 %"]
    rows = [
        [f"{model}: {method}", *(cell.get(budget, "–") for budget in budgets)]
        for (model, method), cell in cells.items()
    ]
    return table(["top-1 % at MACs kept", *budgets], rows)


def facts(records: list[dict[str, Any]]) -> str:
    """Records of any other kind as a table of all their numbers; what is the same in all is left to `source`."""
    hidden = {"command", "date", "machine", "runs", "data", "examples"}
    keys = list(dict.fromkeys(key for one in records for key in one if key not in hidden))
    return rows_of(records, {key: key.replace("_", " ") for key in keys})


def rows_of(records: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """The chosen fields of records as a table under the given headings."""
    return table(
        list(columns.values()),
        [[cell("–" if one.get(key) is None else one[key]) for key in columns] for one in records],
    )


def cell(value: Any) -> str:
    """A value as it stands in a table; of a list its range and median."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        numbers = sorted(max(map(float, str(one).split())) for one in value)
        return f"{numbers[0]:g} – {numbers[len(numbers) // 2]:g} – {numbers[-1]:g}" if numbers else "–"
    return str(value)


def against() -> str:
    """The published search and the budgeted form at its MACs, a row each."""
    header = ["", "MACs kept", "parameters kept", "sum of errors", "top-1 %", "seconds", "GiB", "dense layers"]
    rows = []
    for one in newest("published_against_exact"):
        name = f"{one['decomposition']}: {one['method']}"
        if "failed" in one:
            rows.append([name, one["failed"], *["–"] * 6])
            continue
        shares = [f"{100 * one[key]:.1f} %" for key in ("macs_kept", "params_kept")]
        numbers = [f"{one['objective']:.3f}", f"{one['top1']:.2f}", f"{one['seconds']:.1f}", f"{one['peak_gib']:.2f}"]
        rows.append([name, *shares, *numbers, str(one["kept_dense"])])
    return table(header, rows)


def calibrations(records: list[dict[str, Any]], *, stages: bool) -> str:
    """Accuracy by network, calibration and budget; with the seconds of every stage if wanted."""
    header = ["network: calibration", "MACs kept", "parameters kept", "MACs", "parameters", "top-1 %", "against base"]
    names = list(dict.fromkeys(name for one in records for name in one["stages"])) if stages else []
    rows = [
        [
            f"{one['model']}: {one['method']}",
            *(f"{100 * one[key]:.1f} %" for key in ("macs_kept", "params_kept")),
            f"{one['macs'] / 1e6:.2f} M",
            f"{one['params'] / 1e3:.1f} k",
            f"{one['top1']:.2f}",
            f"{one['difference']:+.2f}",
            *(f"{one['stages'].get(name, 0):.1f}" for name in names),
        ]
        for one in records
    ]
    return table([*header, *(f"{name}, s" for name in names)], rows)


FINE_TUNINGS = {
    "long runs": lambda one: one["epochs"] >= 5 and "synthetic" not in one["inputs"],
    "formats": lambda one: one["case"] == "third" and "synthetic" not in one["inputs"],
    "data-free": lambda one: "synthetic" in one["inputs"],
    "short runs": lambda one: one["epochs"] < 5 and one["case"] != "third" and "synthetic" not in one["inputs"],
}
"""The parts of fine-tuning's records, by their markers in docs/training.md."""


def fine_tunings(records: list[dict[str, Any]]) -> str:
    """Fine-tuned networks: what they cost, and their accuracy before and after a run; "20 + 10" is a second run."""
    columns = {
        "decomposition": "",
        "macs_kept": "MACs kept",
        "params_kept": "parameters kept",
        "inputs": "inputs",
        "teacher": "teacher",
        "epochs": "epochs",
        "optimiser": "optimiser",
        "rate": "rate",
        "scaled": "scaled gradients",
        "damping": "damping",
        "loss": "loss of the last epoch",
        "compressed_top1": "before, top-1 %",
        "top1": "fine-tuned, top-1 %",
        "base_top1": "base",
        "seconds_per_epoch": "seconds per epoch",
    }
    order = ("decomposition", "optimiser", "epochs_before", "damping", "epochs", "rate")
    rows = sorted(records, key=lambda one: (-one["macs_kept"], *(one[name] for name in order)))
    rows = [
        {**one, "epochs": f"{one['epochs_before']} + {one['epochs']}"} if one["epochs_before"] else one for one in rows
    ]
    settings = ("inputs", "teacher", "optimiser", "scaled", "damping", "epochs")
    same = [key for key in settings if len({one[key] for one in rows}) == 1]
    told = ", ".join(f"{columns[key]} {cell(rows[0][key])}" for key in same)
    shown = {key: title for key, title in columns.items() if key not in same}
    return rows_of(rows, shown) + (f"\n\nThe same in all: {told}." if told else "")


UNITS = {
    "lost": {
        "model": "network",
        "method": "decompositions",
        "calibration": "calibrated on",
        "macs_kept": "MACs kept",
        "params_kept": "parameters kept",
        "base_top1": "top-1 %",
        "top1": "compressed",
        "lost": "points lost",
        "narrowed": "sets narrowed",
        "decomposed": "layers of low rank",
        "seconds": "seconds",
        "peak_gb": "GB",
    },
    "perplexity": {
        "model": "language model",
        "blocks_kept": "of the blocks' parameters",
        "base_perplexity": "perplexity",
        "perplexity": "compressed",
        "seconds": "seconds",
        "peak_gb": "GB",
    },
    "realised": {
        "model": "network, channels last",
        "method": "decomposition",
        "batch": "batch",
        "align": "widths are multiples of",
        "macs_kept": "MACs kept",
        "time_kept": "time kept, side by side with the original",
        "realised": "time saved over MACs saved",
    },
}
"""The columns of the records of units, by the field that tells their kind."""


def units(records: list[dict[str, Any]]) -> str:
    """Networks with fewer channels, by model: accuracy, perplexity, and the speed that came of it."""
    rows = sorted(records, key=lambda one: (one["model"], one.get("align", 0), -one.get("budget", 0)))
    parts = (([one for one in rows if field in one], columns) for field, columns in UNITS.items())
    return "\n\n".join(rows_of(part, columns) for part, columns in parts if part)


REFINING = {
    "model": "network",
    "method": "decomposition",
    "macs_kept": "MACs kept",
    "epochs": "epochs by blocks",
    "copies": "copies of each image",
    "distilled": "epochs as a whole",
    "calibration": "calibrated on",
    "top1": "top-1 %",
    "lost": "points lost",
    "blocks_improved": "blocks improved",
    "seconds": "seconds",
    "peak_gb": "GB",
}
"""The columns of the records of refining by blocks, and of distilling."""
SPEED = {
    "case": "job",
    "what": "what",
    "seconds": "seconds",
    "peak_gb": "GB",
    "score": "score",
}
"""The columns of the records of calibrated compression."""


def bits(records: list[dict[str, Any]]) -> str:
    """A language model by what is kept of it and the bits of its weights."""
    texts = [text for text in records[0]["perplexity"] if all(text in one["perplexity"] for one in records)]
    header = ["of the blocks kept", "bits", "MB", *(f"perplexity, {text}" for text in texts)]
    rows = [
        [
            f"{100 * one['blocks_kept']:.0f} %",
            str(one["bits"]),
            str(one["megabytes"]),
            *map(str, one["perplexity"].values()),
        ]
        for one in sorted(records, key=lambda one: -one["megabytes"])
    ]
    return table(header, rows)


def text_rates(records: list[dict[str, Any]]) -> str:
    """Fine-tunings of a language model on text, before and after."""
    header = ["optimiser", "rate", "labels", "steps", "tokens", "held-out perplexity", "wikitext2", "pydoc", "seconds"]
    rows = [
        [
            one["optimiser"],
            f"{one['rate']:g}",
            "next tokens" if one.get("labels", True) else "none",
            str(one["steps"]),
            f"{one['tokens']:,}",
            *(" → ".join(map(str, pair)) for pair in (one["held_out"], *one["perplexity"].values())),
            str(one["seconds"]),
        ]
        for one in sorted(records, key=lambda one: (one["steps"], one["optimiser"], one["rate"]))
    ]
    return table(header, rows)


def growth(records: list[dict[str, Any]]) -> str:
    """Seconds and gigabytes by sizes, and the exponents by which they grow."""
    header = ["layers", "what grows", "sizes", "seconds", "exponent", "gigabytes", "exponent"]
    rows = [
        [
            one["kind"],
            one["axis"],
            *(", ".join(f"{value:g}" for value in one[name]) for name in ("sizes", "seconds")),
            f"{one['exponent_of_time']:g}",
            ", ".join(f"{value:g}" for value in one["gigabytes"]),
            f"{one['exponent_of_memory']:g}",
        ]
        for one in records
    ]
    return table(header, rows)


def sums(records: list[dict[str, Any]]) -> str:
    """What is reached by the least of every sum of errors, a column per network."""
    columns = list(dict.fromkeys((one["model"], one["method"], one["kept"]) for one in records))
    ways = list(dict.fromkeys(one["sum"] for one in records))
    found = {(one["model"], one["method"], one["kept"], one["sum"]): one for one in records}
    header = ["the least sum of …", *(f"{model}, {method}, {100 * kept:.0f} %" for model, method, kept in columns)]
    rows = [
        [
            way,
            *(str(one.get("top1", one.get("perplexity", "–"))) for one in (found.get((*c, way), {}) for c in columns)),
        ]
        for way in ways
    ]
    return table(header, rows)


CALIBRATED = {"valid": "text", "written": "its own", "mixed": "half and half", "random": "random"}
"""What a language model was calibrated on: a text, tokens that it wrote, of both, or tokens at random."""


def _calibrated_on(one: dict[str, Any]) -> str:
    """What a language model was calibrated on, and on how many blocks, where they are not 128."""
    kind = one.get("inputs", "valid")
    what = CALIBRATED.get(kind) or f"{100 * float(kind):.0f} % its own"
    return what if one["rows"] == 128 else f"{what}, {one['rows']} blocks"


def language_models(records: list[dict[str, Any]]) -> str:
    """A language model by method and size: perplexity on both texts, what was lost, and the speed that came of it."""
    header = ["method", "calibrated on", "epochs by blocks, of the whole", "of the blocks kept"]
    texts = [text for text in records[0]["perplexity"] if all(text in one["perplexity"] for one in records)]
    header += [f"perplexity, {text}" for text in texts] + [f"nats lost, {text}" for text in texts]
    header += ["tokens/s, prompt", "tokens/s, written", "seconds, and to write inputs", "GB"]
    rows = [
        [
            one["method"],
            _calibrated_on(one),
            f"{one['epochs']}, {one.get('distilled', 0)}",
            f"{100 * one['blocks_kept']:.1f} %",
            *(f"{one['perplexity'][text]} ({one['base_perplexity'][text]})" for text in texts),
            *(f"{one['nats_lost'][text]:.3f}" for text in texts),
            *(f"{share:.2f}×" for share in one["speed_kept"] or ()),
            *(["–"] * (0 if one["speed_kept"] else 2)),
            _seconds_of(one),
            str(one["peak_gb"]),
        ]
        for one in sorted(records, key=_language_order)
    ]
    return table(header, rows)


def _seconds_of(one: dict[str, Any]) -> str:
    """The time that a record took, with that for the inputs that the model wrote, and where, if not on a CPU."""
    making = one.get("making_seconds", 0.0)
    found = f"{one['seconds']} + {making}" if making > 1 else str(one["seconds"])
    return found if one.get("device", "cpu") == "cpu" else f"{found}, {one['device']}"


def _language_order(one: dict[str, Any]) -> tuple[Any, ...]:
    return -round(one["blocks_kept"], 2), one["method"], one["epochs"] + one.get("distilled", 0)


LATENCY = {
    "model": "network",
    "method": "decomposition",
    "batch": "batch",
    "form": "form",
    "original_ms": "original, ms",
    "first_off": "first plan, predicted over measured − 1",
    "last_off": "last plan",
    "turns": "plans",
    "time_kept": "time kept, timed again",
    "macs_kept": "MACs kept",
    "study_seconds": "seconds to measure",
}
"""The columns of the records of limits on latency."""
LARGE = {
    "case": "model",
    "params": "parameters",
    "params_kept": "kept",
    "tokens": "calibration tokens",
    "seconds": "seconds",
    "measuring": "measuring",
    "fitting": "fitting and writing",
    "peak_gb": "GB of memory",
    "peak_with_mapped_gb": "with mapped files",
}
"""The columns of the records of models larger than memory."""
WITHIN = {
    "model": "network",
    "batch": "batch",
    "budget": "budget",
    "time_kept": "time kept",
    "macs_kept": "MACs kept",
    "top1": "top-1 %",
    "lost": "points lost",
    "seconds": "seconds",
}
"""The columns of the records of accuracy within them."""


NETWORKS = {
    "cifar10_resnet20": "ResNet-20, CIFAR-10",
    "resnet50": "ResNet-50",
    "mobilenet_v2": "MobileNetV2",
    "deit_tiny": "DeiT-Tiny",
}
"""Networks with many budgets, in the picture and in docs/accuracy.md."""
ACCURACY = {
    "network": "network",
    "method": "decomposition",
    "macs_kept": "MACs kept",
    "params_kept": "parameters kept",
    "epochs": "epochs by blocks",
    "copies": "copies of each image",
    "distilled": "epochs as a whole",
    "base_top1": "top-1 %",
    "top1": "compressed",
    "lost": "points lost",
    "seconds": "seconds",
}
"""The columns of the last records at every budget."""
DEFAULT = {
    "method": "",
    "top1": "top-1 %",
    "lost": "points lost",
    "time_kept_1": "time kept, one image",
    "time_kept_16": "sixteen",
}
"""The columns of every decomposition on a network."""
VGG = {
    "decomposition": "",
    "macs_kept": "MACs kept",
    "params_kept": "parameters kept",
    "base_top1": "top-1 %",
    "compressed_top1": "compressed",
    "epochs": "epochs of training",
    "top1": "fine-tuned",
    "seconds": "seconds to compress",
}
"""The columns of VGG-16 at the paper's sizes."""
QUANTISATION = {
    "model": "network",
    "method": "",
    "bits": "bits",
    "top1": "top-1 %",
    "megabytes": "MB",
    "time_kept_1": "time kept, one image",
    "time_kept_16": "sixteen",
    "openvino_time_kept_1": "in OpenVINO, one",
    "openvino_time_kept_16": "sixteen",
}
"""The columns of networks in eight bits."""
PAPER = {
    "decomposition": "",
    "macs_kept": "MACs kept",
    "params_kept": "parameters kept",
    "base_top1": "top-1 %",
    "compressed_top1": "before training",
    "top1": "fine-tuned",
    "epochs": "epochs",
    "teacher": "teacher",
    "inputs": "trained on",
    "device": "device",
}
"""The columns of networks of the paper's sizes."""


def most_refined(model: str) -> list[dict[str, Any]]:
    """The last distilled record at every budget, or refined one, or the last, from given inputs without labels."""
    found: dict[float, dict[str, Any]] = {}
    for one in (*gathered("units"), *gathered("refining")):
        if one.get("model") == model and "top1" in one and one.get("calibration", "given inputs") == "given inputs":
            budget = round(one["macs_kept"], 2)
            if budget not in found or _recency(one) >= _recency(found[budget]):
                found[budget] = {"epochs": 0, "copies": 0, "distilled": 0, **one, "network": NETWORKS[model]}
    return [found[budget] for budget in sorted(found)]


def _recency(one: dict[str, Any]) -> tuple[int, bool, str, int]:
    """Epochs as a whole, whether blocks were refined, the day, and epochs by blocks, copies counting as they do."""
    epochs = int(one.get("epochs", 0) * (1 + one.get("copies", 0)))
    return one.get("distilled", 0), epochs > 0, one["date"], epochs


def _by_effort(one: dict[str, Any]) -> tuple[Any, ...]:
    """By network, from the largest budget to the least, from the least epochs to the most."""
    return one.get("model", ""), -one.get("budget", 0), one.get("epochs", 0), one["distilled"]


PUBLISHED: tuple[list[Any], ...] = (
    ["RENE, tensor train (arXiv 2409.03555)", 0.296, 0.277, "labels, 100 epochs", 91.25, 91.40],
    ["RENE, CP (arXiv 2409.03555)", 0.266, 0.224, "labels, 100 epochs", 91.25, 90.82],
)
"""What the paper reports for ResNet-20 on CIFAR-10: who, MACs and parameters kept, what was used, base and top-1."""


def side_by_side() -> str:
    """ResNet-20 by what tools that only decompose give, by the paper, and by rankfold, from most MACs to least."""
    name = "cifar10_resnet20"
    rows: list[list[Any]] = [
        [f"{one['method']}, the same fraction everywhere, weights alone", *_sizes(one), "nothing", *_tops(one)]
        for one in gathered("weights_alone")
    ]
    rows += [
        [f"rankfold, {one['method']}{_recovered(one)}", *_sizes(one), "512 images without labels", *_tops(one)]
        for one in (*gathered("units"), *gathered("refining"))
        if one.get("model") == name and one["method"] == "auto"
    ]
    rows += PUBLISHED
    rows += [
        [
            f"rankfold, {one['decomposition']}, trained",
            *_sizes(one),
            f"labels, {one['epochs']} epochs, a teacher",
            *_tops(one),
        ]
        for one in trained()
    ]
    rows.sort(key=lambda row: (-round(row[1], 2), row[5]))
    header = ["ResNet-20, CIFAR-10", "MACs kept", "parameters kept", "what it used", "base", "top-1 %", "points lost"]
    cells = [[*(f"{one:.3g}" if isinstance(one, float) and one < 1 else f"{one}" for one in row)] for row in rows]
    return table(header, [[*line, f"{row[4] - row[5]:.2f}"] for line, row in zip(cells, rows, strict=True)])


def _recovered(one: dict[str, Any]) -> str:
    """What was done for the accuracy of a network after least squares."""
    refined = ", refined by blocks" if one.get("epochs") else ""
    return f"{refined}, distilled" if one.get("distilled") else refined


def _sizes(one: dict[str, Any]) -> list[float]:
    return [one["macs_kept"], one["params_kept"]]


def _tops(one: dict[str, Any]) -> list[float]:
    return [one["base_top1"], one["top1"]]


def trained() -> list[dict[str, Any]]:
    """The last of the longest runs of every size of the paper's, with all its epochs."""
    runs = [
        {**one, "epochs": one["epochs"] + one["epochs_before"], "device": one.get("device", "cpu")}
        for one in newest("finetune")
        if one["case"] in ("tt", "cp", "fifth")
    ]
    longest = {one["case"]: one for one in sorted(runs, key=lambda one: (one["epochs"], one["date"]))}
    return sorted(longest.values(), key=lambda one: -one["macs_kept"])


def _fill_guides() -> None:
    """The tables of docs/accuracy.md, docs/choosing.md and docs/quantisation.md."""
    docs = ROOT / "docs"
    records = [one for model in NETWORKS for one in reversed(most_refined(model))]
    fill(docs / "accuracy.md", "accuracy", f"\n{rows_of(records, ACCURACY)}\n\n{source(records)}")
    ours = trained()
    fill(docs / "accuracy.md", "paper", f"\n{rows_of(ours, PAPER)}\n\n{source(ours)}")
    if records := gathered("vgg16"):
        fill(docs / "accuracy.md", "vgg16", f"\n{rows_of(records, VGG)}\n\n{source(records)}")
    fill(docs / "accuracy.md", "side_by_side", f"\n{side_by_side()}\n")
    if records := gathered("default"):
        parts = []
        for model, budget in dict.fromkeys((one["model"], one["budget"]) for one in records):
            rows = rows_of([one for one in records if one["model"] == model], DEFAULT)
            parts.append(f"### {model}, {100 * budget:.0f} % of the MACs\n\n{rows}")
        fill(docs / "choosing.md", "default", "\n" + "\n\n".join([*parts, source(records)]))
    if records := gathered("quantisation"):
        fill(docs / "quantisation.md", "quantisation", f"\n{rows_of(records, QUANTISATION)}\n\n{source(records)}")


def fill(path: Path, marker: str, body: str) -> None:
    """Puts a text between a file's markers."""
    filled = f"<!-- {marker} -->\n{body}\n<!-- /{marker} -->"
    pattern = rf"<!-- {marker} -->(.*<!-- /{marker} -->)?"
    path.write_text(re.sub(pattern, lambda _: filled, path.read_text(), flags=re.DOTALL))


def main() -> None:
    """Writes docs/results.md, and the tables between the markers of the README and docs/search.md."""
    sections = ["# Results\n\nMade by `python benchmarks/tables.py` from benchmarks/results; not to be edited."]
    titles = {
        "resnet20_frobenius": "ResNet-20 on CIFAR-10 at half the MACs, from the weights alone",
        "calibration": "Calibration: none, synthetic inputs, real ones; no fine-tuning, no labels",
        "minilm_calibration": "Calibration of a sentence transformer",
        "finetune": "ResNet-20 on CIFAR-10, compressed and fine-tuned",
        "damping": "Damped CP factors",
        "rates": "Learning rates by decomposition and strength",
        "throughput": "Images per second of fine-tuning against a plain loop",
        "lenet_pipeline": "LeNet on MNIST, compressed and fine-tuned in one command",
        "tucker_choices": "Balanced ranks and the closed form, for Tucker and trains",
        "speed": "Time and memory of compression",
        "exact_search": "The exact search",
        "optimality": "The continuous search against the proven bound",
        "planted_rank": "How often a planted rank is found",
        "published_against_exact": "RENE as published against the budgeted form",
        "end_to_end": "Ranks by the divergence from the original, and by reconstruction errors",
        "lenet": "LeNet on MNIST",
        "ablation": "Alternating against simultaneous updates",
        "sensitivity": "Sensitivity to the published search's constants",
        "search_cost": "Cost of the search",
        "layer_exactness": "Factorised layers against the dense layer with the reconstructed weight",
    }
    for name, title in titles.items():
        records = newest(name)
        if not records:
            continue
        if name == "tucker_choices":
            body = choices()
        elif name == "published_against_exact":
            body = against()
        elif name == "calibration":
            body = calibrations(records, stages=True)
        elif name == "finetune":
            body = fine_tunings(records)
        else:
            body = accuracies(records) if "error_reached" in records[0] and "top1" in records[0] else facts(records)
        sections.append(f"## {title}\n\n{body}\n\n{source(records)}")
    (ROOT / "docs").mkdir(exist_ok=True)
    (ROOT / "docs" / "results.md").write_text("\n\n".join(sections) + "\n")
    records = newest("resnet20_frobenius")
    fill(ROOT / "README.md", "results", f"{accuracies(records)}\n\n{source(records)}")
    records = newest("end_to_end")
    fill(ROOT / "docs" / "search.md", "end to end", f"\n{accuracies(records)}\n\n{source(records)}")
    records = newest("calibration")
    for marker, chosen in (("calibration", False), ("samples", True)):
        part = [one for one in records if (one["part"] == "samples") == chosen]
        if not part:
            continue
        body = f"\n{calibrations(part, stages=False)}\n\n{source(part)}"
        fill(ROOT / "docs" / "calibration.md", marker, body)
    if records := newest("architectures"):
        fill(ROOT / "docs" / "architectures.md", "architectures", f"\n{architectures(records)}\n\n{source(records)}")
    _fill_sizes()
    records = newest("published_against_exact")
    fill(ROOT / "docs" / "search.md", "published", f"\n{against()}\n\n{source(records)}")
    _fill_training()
    _fill_guides()


def _fill_sizes() -> None:
    """The tables of limits on latency, and of models larger than memory."""
    records = gathered("latency_budget")
    for marker, columns, field in (("latency_budget", LATENCY, "first_off"), ("latency_accuracy", WITHIN, "lost")):
        part = [
            {**one, "turns": len(one.get("turns_ms", ())), "form": "compiled" if one.get("compiled") else "as it is"}
            for one in records
            if field in one
        ]
        if part:
            fill(ROOT / "docs" / "latency.md", marker, f"\n{rows_of(part, columns)}\n\n{source(part)}")
    if records := gathered("chosen"):
        fill(ROOT / "docs" / "choosing.md", "chosen", f"\n{chosen(records)}\n\n{source(records)}")
    if records := gathered("large"):
        fill(ROOT / "docs" / "large.md", "large", f"\n{rows_of(records, LARGE)}\n\n{source(records)}")


def chosen(records: list[dict[str, Any]]) -> str:
    """How often decompositions are chosen, a row per network and limit, and what `auto` saves."""
    names = sorted({name for one in records for name in one["layers"]}, key=lambda name: (name == "none", name))
    header = ["network", "limit", *names, "study of all, s", "of `auto`, s"]
    rows = [
        [
            one["model"],
            one["unit"],
            *(str(one["layers"].get(name, 0)) for name in names),
            f"{one['seconds_all']:.1f}",
            f"{one['seconds_auto']:.1f}",
        ]
        for one in records
    ]
    return table(header, rows)


def architectures(records: list[dict[str, Any]]) -> str:
    """What came of every architecture, a row each."""
    header = ["network", "family", "from", "parameters", "kept", "in reach", "seconds", "exported", "result"]
    rows = [
        [
            one["name"],
            one["family"],
            one["library"],
            f"{one['params_before'] / 1e6:.2f} M" if "params_before" in one else "–",
            f"{100 * one['params_after'] / one['params_before']:.1f} %" if "params_after" in one else "–",
            f"{100 * one['within_reach']:.0f} %" if "within_reach" in one else "–",
            f"{one['seconds']:.1f}" if "seconds" in one else "–",
            "as little as the original" if one.get("export", "").startswith("nor") else one.get("export", "no"),
            one["result"].partition(". (")[0].replace("|", "/"),
        ]
        for one in records
    ]
    passed = sum(one["result"] == "pass" for one in records)
    return f"{passed} of {len(records)} pass.\n\n{table(header, rows)}"


def _fill_training() -> None:
    """The tables of docs/training.md, the README's of long runs, and that of docs/calibration.md of plain facts."""
    for marker, path in (
        ("minilm_calibration", "calibration"),
        ("throughput", "training"),
        ("damping", "training"),
        ("rates", "training"),
        ("lenet_pipeline", "training"),
    ):
        if records := newest(marker):
            fill(ROOT / "docs" / f"{path}.md", marker, f"\n{facts(records)}\n\n{source(records)}")
    if records := gathered("units"):
        fill(ROOT / "docs" / "units.md", "units", f"\n{units(records)}\n\n{source(records)}")
    for marker, columns in (("refining", REFINING), ("calibrated_speed", SPEED)):
        if records := gathered(marker):
            records = [{"copies": 0, "distilled": 0, "calibration": "given inputs", **one} for one in records]
            rows = sorted(records, key=_by_effort)
            fill(ROOT / "docs" / "calibration.md", marker, f"\n{rows_of(rows, columns)}\n\n{source(records)}")
    if records := gathered("language"):
        records.sort(key=lambda one: (one["method"], one.get("inputs", "valid"), one["epochs"], -one["blocks_kept"]))
        fill(ROOT / "docs" / "language.md", "language", f"\n{language_models(records)}\n\n{source(records)}")
    for marker, rows_of_records, path in (
        ("language_bits", bits, "language"),
        ("language_finetuning", text_rates, "language"),
        ("cost", growth, "cost"),
        ("sums", sums, "units"),
    ):
        if records := gathered(marker):
            fill(ROOT / "docs" / f"{path}.md", marker, f"\n{rows_of_records(records)}\n\n{source(records)}")
    for marker, belongs in FINE_TUNINGS.items():
        if part := [one for one in newest("finetune") if belongs(one)]:
            body = f"\n{fine_tunings(part)}\n\n{source(part)}"
            fill(ROOT / "docs" / "training.md", marker, body)
            if marker == "long runs":
                fill(ROOT / "README.md", marker, body)


if __name__ == "__main__":
    main()
