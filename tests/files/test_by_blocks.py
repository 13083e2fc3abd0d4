"""Models compressed from files to files, a block at a time, against the same models in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run  # type: ignore[import-not-found]
from safetensors.torch import load_file

from rankfold import ArtifactError, Budget, BudgetError, ModelError, compress, compress_files, plan_of
from rankfold.files.records import read_record, write_record
from rankfold.files.stream import row_of, skeleton
from rankfold.search.curves import Price
from rankfold.sources.models import optional

transformers = optional("transformers", "hf")

SIZES = {
    "hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 60, "max_position_embeddings": 64,
}  # fmt: skip


def saved(folder: Path, config: Any, *, dtype: torch.dtype = torch.float32, shard: str = "60KB") -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def tokens(rows: int = 16) -> torch.Tensor:
    return torch.randint(60, (rows, 24), generator=torch.Generator().manual_seed(1))


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).detach().square().sum() / other.detach().float().square().sum())


CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "llama, tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "gpt2": lambda: transformers.GPT2Config(n_embd=48, n_layer=3, n_head=4, vocab_size=60, n_positions=64),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES, head_dim=12, sliding_window=8),
    "opt": lambda: transformers.OPTConfig(
        hidden_size=48, ffn_dim=128, num_hidden_layers=3, num_attention_heads=4, vocab_size=60,
        max_position_embeddings=64, word_embed_proj_dim=48,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_compressed_directory_loads_and_keeps_the_budget(name: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "whole", CONFIGS[name]())
    plan = compress_files(
        tmp_path / "whole", tmp_path / "small", budget=Budget(params=0.8), calibration=tokens().split(4)
    )
    small = loaded(tmp_path / "small")
    total = sum(one.numel() for one in small.parameters())
    assert total == plan.after.params <= 0.8 * plan.before.params
    assert plan.before.params == sum(one.numel() for one in model.parameters())
    assert plan_of(small) == plan
    assert plan.decomposed
    assert distance(small(tokens()).logits, model(tokens()).logits) < 0.5
    written = small.generate(tokens(1)[:, :5], max_new_tokens=4, do_sample=False)
    assert written.shape == (1, 9)


def test_with_the_whole_budget_nothing_changes(tmp_path: Path) -> None:
    model = saved(tmp_path / "whole", CONFIGS["llama"]())
    compress_files(tmp_path / "whole", tmp_path / "same", budget=Budget(params=1.0))
    assert torch.equal(loaded(tmp_path / "same")(tokens()).logits, model(tokens()).logits)


def test_factors_are_those_of_the_model_in_memory(tmp_path: Path) -> None:
    """The moments of a block's inputs are the same, so at the ranks that were chosen so are the factors."""
    model, given = saved(tmp_path / "whole", CONFIGS["llama"]()), list(tokens().split(4))
    plan = compress_files(tmp_path / "whole", tmp_path / "small", budget=Budget(params=0.8), calibration=given)
    known = {layer.name: layer for layer in plan.layers}
    direct = compress(
        model, tokens(1), decomposition="svd", budget=Budget(params=0.8), calibration=given, sequential=False, align=8
    )
    shared = [one for one in direct.plan.decomposed if known[one.name].ranks == one.ranks]
    assert shared
    for one in shared:
        assert known[one.name].error == pytest.approx(one.error, rel=0.05)


def test_channels_can_go_as_well(tmp_path: Path) -> None:
    model = saved(tmp_path / "whole", CONFIGS["llama"]())
    plan = compress_files(
        tmp_path / "whole",
        tmp_path / "small",
        budget=Budget(params=0.75),
        decomposition=["svd", "interpolative"],
        calibration=tokens(64).split(4),
    )
    assert plan.narrowings
    small = loaded(tmp_path / "small")
    assert sum(one.numel() for one in small.parameters()) == plan.after.params
    assert distance(small(tokens()).logits, model(tokens()).logits) < 0.5


def test_bfloat16_stays_and_other_files_go_along(tmp_path: Path) -> None:
    saved(tmp_path / "whole", CONFIGS["llama"](), dtype=torch.bfloat16)
    (tmp_path / "whole" / "special_tokens_map.json").write_text("{}")
    compress_files(tmp_path / "whole", tmp_path / "small", budget=Budget(params=0.8))
    assert (tmp_path / "small" / "special_tokens_map.json").is_file()
    assert (tmp_path / "small" / "generation_config.json").is_file()
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    for file in set(index["weight_map"].values()):
        assert {one.dtype for one in load_file(tmp_path / "small" / file).values() if one.numel()} == {torch.bfloat16}
    assert loaded(tmp_path / "small").dtype == torch.bfloat16


def test_no_more_than_one_block_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "whole", CONFIGS["llama"]())
    model = skeleton(tmp_path / "whole")
    row = model.get_submodule(row_of(model))
    most = [0]
    from rankfold.files import by_blocks

    def watched(block: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        there = [one for one in seen if any(not p.is_meta for p in one.parameters())]
        most[0] = max(most[0], len(there))
        return measured(block, *args, **kwargs)

    seen: list[Any] = []
    made, measured = by_blocks.skeleton, by_blocks.measure_block

    def kept(directory: Path) -> Any:
        built = made(directory)
        seen.extend(built.get_submodule(row_of(built)).children())
        return built

    monkeypatch.setattr(by_blocks, "skeleton", kept)
    monkeypatch.setattr(by_blocks, "measure_block", watched)
    compress_files(tmp_path / "whole", tmp_path / "small", budget=Budget(params=0.8))
    assert most[0] == 1
    assert len(row) == 3


class Killed(BaseException):
    """What ends a run at once."""


@pytest.mark.parametrize("where", ["measure_block", "fit_block"])
@pytest.mark.parametrize("choices", [["svd", "interpolative"], ["cp3"]])
def test_a_run_that_was_killed_goes_on_to_the_same_result(
    where: str, choices: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rankfold.files import by_blocks

    saved(tmp_path / "whole", CONFIGS["llama"]())
    options: dict[str, Any] = {"budget": Budget(params=0.75), "decomposition": choices, "memory": "1GB"}
    given = list(tokens(64).split(4))
    plan = compress_files(tmp_path / "whole", tmp_path / "straight", calibration=given, **options)
    work, calls = getattr(by_blocks, where), []

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return work(*args, **kwargs)

    monkeypatch.setattr(by_blocks, where, dying)
    options |= {"calibration": given, "resume": True}
    with pytest.raises(Killed):
        compress_files(tmp_path / "whole", tmp_path / "small", **options)
    assert (tmp_path / ".small.partial").is_dir()
    with pytest.raises(ArtifactError, match=r"another run \(its decomposition differ\)"):
        compress_files(tmp_path / "whole", tmp_path / "small", **{**options, "decomposition": "tucker"})
    again = compress_files(tmp_path / "whole", tmp_path / "small", **options)
    assert len(calls) == 4  # two blocks, the one that it died at, and that one again
    assert again == plan
    for path in sorted((tmp_path / "straight").iterdir()):
        assert (tmp_path / "small" / path.name).read_bytes() == path.read_bytes(), path.name
    assert sorted(one.name for one in tmp_path.iterdir()) == ["small", "straight", "whole"]


def test_what_was_measured_serves_another_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rankfold.files import by_blocks

    saved(tmp_path / "whole", CONFIGS["llama"]())
    options: dict[str, Any] = {"decomposition": "svd", "memory": "1GB"}
    straight = compress_files(tmp_path / "whole", tmp_path / "straight", budget=Budget(params=0.8), **options)
    with pytest.raises(BudgetError, match="smallest feasible one"):
        compress_files(tmp_path / "whole", tmp_path / "small", budget=Budget(params=0.01), resume=True, **options)
    monkeypatch.setattr(by_blocks, "measure_block", lambda *_, **__: pytest.fail("measured again"))
    again = compress_files(tmp_path / "whole", tmp_path / "small", budget=Budget(params=0.8), resume=True, **options)
    assert again == straight


def test_without_being_asked_for_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rankfold.files import by_blocks

    saved(tmp_path / "whole", CONFIGS["llama"]())
    monkeypatch.setattr(by_blocks, "fit_block", lambda *_, **__: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        compress_files(tmp_path / "whole", tmp_path / "small", budget=Budget(params=0.8))
    assert [one.name for one in tmp_path.iterdir()] == ["whole"]


def test_records_come_back_and_nothing_else_is_made(tmp_path: Path) -> None:
    price = Price((0.5, float("inf")), (1.0, 2.0))
    record = {"a": (price, [1, None, "x"]), 3: np.arange(4).reshape(2, 2), "b": torch.ones(2, dtype=torch.bfloat16)}
    write_record(tmp_path / "record", record)
    found = read_record(tmp_path / "record", {"Price": Price})
    assert found["a"] == record["a"]
    assert np.array_equal(found[3], np.arange(4).reshape(2, 2))
    assert torch.equal(found["b"], torch.ones(2, dtype=torch.bfloat16))
    for kinds, content in (({}, None), ({"Price": Price}, b"cut off")):
        if content:
            (tmp_path / "record").write_bytes(content)
        with pytest.raises(ArtifactError, match="cannot be read"):
            read_record(tmp_path / "record", kinds)
    with pytest.raises(TypeError, match="set is no number"):
        write_record(tmp_path / "record", {1})


def test_what_cannot_be_done_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "whole", CONFIGS["llama"]())
    for budget in (Budget(latency=0.5), Budget(error=0.1)):
        with pytest.raises(BudgetError, match="limit one of these"):
            compress_files(tmp_path / "whole", tmp_path / "small", budget=budget)
    with pytest.raises(BudgetError, match="smallest feasible one"):
        compress_files(tmp_path / "whole", tmp_path / "small", budget=Budget(params=0.01))
    with pytest.raises(ModelError, match=r"config\.json"):
        compress_files(tmp_path / "none", tmp_path / "small", budget=Budget(params=0.8))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="other"):
        compress_files(tmp_path / "whole", tmp_path / "other", budget=Budget(params=0.8))
    next((tmp_path / "whole").glob("model-00002*")).write_bytes(b"cut off")
    with pytest.raises(ModelError, match="cannot be read"):
        compress_files(tmp_path / "whole", tmp_path / "small", budget=Budget(params=0.8))
    assert sorted(one.name for one in tmp_path.iterdir()) == ["other", "whole"]


def test_an_encoder_and_decoder_is_no_row(tmp_path: Path) -> None:
    config = transformers.T5Config(d_model=32, d_ff=64, num_layers=2, num_heads=2, d_kv=16, vocab_size=60)
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "whole")
    with pytest.raises(ModelError, match="row|run on"):
        compress_files(tmp_path / "whole", tmp_path / "small", budget=Budget(params=0.8), calibration=[tokens(2)])


def test_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "whole", CONFIGS["llama"]())
    paths = (str(tmp_path / "whole"), "--out", str(tmp_path / "small"))
    code, told, _ = run(capsys, monkeypatch, "compress-files", *paths, "--budget", "params=0.9")
    assert code == 0
    assert "import rankfold" in told
    text = tmp_path / "text.txt"
    text.write_text("a text")
    more = ("--budget", "params=0.9", "--calibration", f"text:{text}")
    code, _, error = run(capsys, monkeypatch, "compress-files", *paths, *more)
    assert (code, "no tokenizer" in error) == (2, True)
