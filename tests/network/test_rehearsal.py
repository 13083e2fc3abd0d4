"""Plans rehearsed on the network: what they make runs, costs what they say, and is given back by what is saved."""

from __future__ import annotations

import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_networks import PACKED, TOKENS, Experts, Run, random_
from torch import Tensor, nn
from torch.nn import functional

from rankfold import Budget, BudgetError, Cost, ModelError, Plan, Result, compress, load, save
from rankfold.network.copies import duplicate
from rankfold.network.costs import cost_of
from rankfold.network.factorised import Factorised, as_plain
from rankfold.network.passes import arguments_of, copied, output_of, run, tensors_in
from rankfold.network.rehearsal import dense_twin, rehearse, verified

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor"),
]


def compressed(model: nn.Module, inputs: Any, *, params: float = 0.7, **options: Any) -> Result:
    given = {"decomposition": "svd", "calibration": "none", **options}
    return compress(model, inputs, budget=Budget(params=params), **given)


def same(given: Any, wanted: Any) -> bool:
    given, wanted = tensors_in(given), tensors_in(wanted)
    return len(given) == len(wanted) and all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True))


def layers_in(plan: Plan, place: str) -> list[str]:
    return [layer.name for layer in plan.decomposed if f"{layer.name}.".startswith(f"{place}.")]


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    return {}


def result_of(results: dict[str, Result], name: str) -> Result:
    """A packed network compressed, once for all tests."""
    if name not in results:
        packed = PACKED[name]
        results[name] = compressed(packed.made(), packed.inputs, params=0.55)
    return results[name]


each_network = pytest.mark.parametrize("name", PACKED)


@each_network
def test_what_is_packed_is_decomposed_within_the_budget_at_the_cost_that_is_measured(name: str, results: dict):
    packed, result = PACKED[name], result_of(results, name)
    assert result.before == cost_of(packed.made(), packed.inputs)
    assert result.after == cost_of(result.model, packed.inputs)
    assert result.after.params <= 0.55 * result.before.params
    places = [place for place in packed.forms if layers_in(result.plan, place)]
    assert places
    assert set(result.plan.opened) == {*places, *(p for p, form in packed.forms.items() if form == "compiled")}


@each_network
def test_a_compressed_network_does_what_the_weights_do_that_its_factors_stand_for(name: str, results: dict):
    packed, result = PACKED[name], result_of(results, name)
    twin = dense_twin(packed.made(), result.model, result.plan)
    assert not any(isinstance(module, Factorised) for module in twin.modules())
    given, wanted = output_of(run(result.model, packed.inputs)), output_of(run(twin, packed.inputs))
    torch.testing.assert_close(given, wanted, rtol=1e-3, atol=1e-4)


@each_network
def test_what_is_saved_is_loaded_bit_equal_into_a_new_network(name: str, results: dict, tmp_path: Path):
    packed, result = PACKED[name], result_of(results, name)
    loaded = load(save(result, tmp_path / "out"), packed.made(seed=1))
    own, other = result.model.state_dict(), loaded.state_dict()
    assert list(own) == list(other)
    assert all(torch.equal(own[key], other[key]) for key in own)
    assert same(run(loaded, packed.inputs), run(result.model, packed.inputs))
    assert cost_of(loaded, packed.inputs) == result.after


@each_network
def test_a_copy_of_a_compressed_network_is_one_of_its_own(name: str, results: dict):
    packed, result = PACKED[name], result_of(results, name)
    wanted = run(result.model, packed.inputs)
    copied = duplicate(result.model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert same(run(result.model, packed.inputs), wanted)


@each_network
def test_a_compressed_network_can_be_trained(name: str, results: dict):
    packed, result = PACKED[name], result_of(results, name)
    student = duplicate(result.model)
    args, kwargs = arguments_of(packed.inputs)
    output_of(student(*args, **kwargs)).square().sum().backward()
    stages = [module for module in student.modules() if isinstance(module, Factorised)]
    assert any(bool(weight.grad.abs().max() > 0) for one in stages for weight in one.weights if weight.grad is not None)
    assert all(weight.requires_grad for one in stages for weight in one.weights)


@pytest.mark.parametrize("name", ["vocoder", "critic", "standardised", "decoder", "compiled"])
def test_a_plain_form_does_the_same(name: str, results: dict):
    packed, result = PACKED[name], result_of(results, name)
    plain = as_plain(duplicate(result.model))
    assert not any(isinstance(module, Factorised) for module in plain.modules())
    assert list(plain.state_dict()) == list(result.model.state_dict())
    assert same(run(plain, packed.inputs), run(result.model, packed.inputs))


def test_a_plan_is_the_same_every_time():
    packed = PACKED["lstm"]
    plans = [compressed(packed.made(), packed.inputs).plan for _ in range(2)]
    assert plans[0].to_json() == plans[1].to_json()


def test_a_compressed_encoder_takes_masks_it_was_not_compressed_with():
    packed = PACKED["encoder"]
    result = compressed(packed.made(), (packed.inputs[0], None))
    twin = dense_twin(packed.made(), result.model, result.plan)
    torch.testing.assert_close(run(result.model, packed.inputs), run(twin, packed.inputs), rtol=1e-3, atol=1e-4)


# embeddings


def embedder(rows: int = 200) -> nn.Module:
    embed = nn.Embedding(rows, 24)
    head = nn.Linear(24, rows, bias=False)
    head.weight = embed.weight
    return Run(lambda s, x: s.head(s.mix(s.embed(x)).tanh()), embed=embed, mix=nn.Linear(24, 24), head=head)


def test_an_included_embedding_shares_its_factors_with_the_head_it_is_tied_to(tmp_path: Path):
    torch.manual_seed(0)
    model = embedder().eval()
    result = compressed(model, TOKENS, params=0.5, include=["embed"])
    (layer,) = result.plan.decomposed
    assert (layer.name, layer.aliases) == ("embed", ("head",))
    embed, head = result.model.embed, result.model.head
    assert head[0].weight is embed[1].weight
    assert head[1].weight is embed[0].weight
    assert embed[0].weight.shape == (200, layer.ranks[0])
    assert torch.equal(embed.weight, head.weight)
    assert result.after.params == sum(p.numel() for p in result.model.parameters()) <= 0.5 * result.before.params
    loaded = load(save(result, tmp_path / "out"), embedder())
    assert loaded.head[1].weight is loaded.embed[0].weight
    assert loaded.head[0].weight is loaded.embed[1].weight
    assert same(run(loaded, TOKENS), run(result.model, TOKENS))


def test_an_embedding_is_left_whole_where_the_budget_can_be_met_without_it():
    model = nn.Sequential(nn.Embedding(40, 32), nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 32)).eval()
    result = compressed(model, TOKENS, params=0.7)
    assert "left whole" in result.plan.skipped["0"]
    assert type(result.model[0]) is nn.Embedding
    tight = compressed(model, TOKENS, params=0.15)
    assert "0" in {layer.name for layer in tight.plan.decomposed}
    assert tight.after.params <= 0.15 * tight.before.params


def test_a_padding_row_gets_no_gradient_in_factors():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(60, 32, padding_idx=3), nn.Linear(32, 4)).eval()
    result = compressed(model, torch.tensor([[3, 5, 8]]), params=0.5, include=["0"])
    result.model(torch.tensor([[3, 5, 3]])).sum().backward()
    narrow = result.model[0][0]
    assert narrow.padding_idx == result.model[0].padding_idx == 3
    assert not narrow.weight.grad[3].any()
    assert narrow.weight.grad[5].any()


# layers that cannot be replaced


def of_low_rank(sizes: int = 48) -> nn.Linear:
    """A layer that every search wants in factors."""
    layer = nn.Linear(sizes, sizes)
    layer.weight.data = random_(sizes, 2) @ random_(2, sizes) / 8
    return layer


class Picky(nn.Module):
    """Three layers, of which forward wants some to be a Linear, which any search wants in factors."""

    def __init__(self, *picky: str) -> None:
        super().__init__()
        self.picky = picky
        self.a, self.b, self.c = (of_low_rank() if name in picky else nn.Linear(48, 48) for name in "abc")

    def forward(self, x: Tensor) -> Tensor:
        for name in self.picky:
            if not isinstance(getattr(self, name), nn.Linear):
                raise TypeError(f"{name} is no Linear")
        return self.c(self.b(self.a(x).relu()).relu())


@pytest.mark.parametrize("names", ["a", "b", "c", "ab", "ac"])
def test_a_layer_that_cannot_be_replaced_stays_with_the_reason_and_the_others_are_planned_anew(names: str):
    torch.manual_seed(0)
    model, x = Picky(*names).eval(), random_(3, 48)
    share = 0.8 if len(names) == 1 else 0.85
    result = compressed(model, x, params=share)
    assert set(result.plan.skipped) == set(names)
    for name in names:
        assert f"{name} is no Linear" in result.plan.skipped[name] or len(names) > 1
        assert "does not run with factors in its place" in result.plan.skipped[name]
        assert type(result.model.get_submodule(name)) is nn.Linear
    assert result.plan.decomposed
    assert not {layer.name for layer in result.plan.decomposed} & set(names)
    assert result.after == cost_of(result.model, x)
    assert result.after.params <= share * result.before.params


def test_a_budget_that_cannot_be_met_names_the_layers_that_cannot_be_replaced():
    with pytest.raises(BudgetError, match=r"these layers cannot be replaced: a \(.*a is no Linear\)"):
        compressed(Picky("a").eval(), random_(3, 48), params=0.3)


def test_a_model_none_of_whose_layers_can_be_replaced_is_refused_with_the_reasons():
    with pytest.raises(ModelError, match="no layer can be replaced: .*is no Linear") as caught:
        compressed(Picky("a", "b", "c").eval(), random_(3, 48))
    assert "\n" not in str(caught.value)


def test_layers_that_fail_only_together_all_stay():
    def forward(s: Run, x: Tensor) -> Tensor:
        if isinstance(s.a, Factorised) and isinstance(s.b, Factorised):
            raise TypeError("not both")
        return s.c(s.b(s.a(x).relu()).relu())

    torch.manual_seed(0)
    model = Run(forward, a=of_low_rank(), b=of_low_rank(), c=nn.Linear(48, 48)).eval()
    result = compressed(model, random_(3, 48), params=0.85)
    assert set(result.plan.skipped) == {"a", "b"}
    assert "not both" in result.plan.skipped["a"]


def test_a_layer_whose_factors_cost_something_else_than_planned_stays():
    def forward(s: Run, x: Tensor) -> Tensor:
        y = s.a(x) if type(s.a) is nn.Linear else s.a(s.a(x))
        return s.b(y.relu())

    torch.manual_seed(0)
    model = Run(forward, a=of_low_rank(), b=nn.Linear(48, 48)).eval()
    result = compressed(model, random_(3, 48), params=0.8)
    assert "MACs, not" in result.plan.skipped["a"]
    assert [layer.name for layer in result.plan.decomposed] == ["b"]
    assert result.after == cost_of(result.model, random_(3, 48))


def test_rehearsing_leaves_the_network_as_it_is_and_tells_the_cost_of_the_plan():
    packed = PACKED["lstm"]
    model = packed.made()
    plan = compressed(model, packed.inputs).plan
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rehearsal = rehearse(model, plan, packed.inputs)
    assert (rehearsal.cost, rehearsal.refused, rehearsal.depends) == (plan.after, {}, False)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_plan_that_is_not_the_student_s_is_not_verified():
    model, x = nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 48)).eval(), random_(3, 48)
    result = compressed(model, x)
    assert verified(model, result.model, result.plan, x) == result.plan
    wrong = replace(result.plan, after=result.plan.after + Cost(0, 1, 0))
    told = verified(model, result.model, wrong, x)
    assert told.after == result.after


# models of other kinds


@pytest.mark.parametrize("place", ["", "0"])
def test_a_forward_that_holds_on_to_the_original_is_refused_in_one_line_before_any_work(place: str):
    model, x, steps = nn.Sequential(nn.Linear(48, 48), nn.Linear(48, 48)).eval(), random_(3, 48), []
    patched = model.get_submodule(place)
    original = patched.forward
    patched.forward = lambda x: original(x) + 1
    with pytest.raises(ModelError, match="its forward was set on the instance and holds on to the original") as caught:
        compressed(model, x, progress=lambda *told: steps.append(told))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(place or "the model")
    assert not steps


def test_a_forward_that_reads_a_tensor_of_the_original_is_refused():
    model = nn.Sequential(nn.Linear(48, 48), nn.Linear(48, 48)).eval()
    weight = model[0].weight
    model[1].forward = lambda x: functional.linear(x, weight)
    with pytest.raises(ModelError, match="1: its forward was set on the instance"):
        compressed(model, random_(3, 48))


def test_a_forward_that_is_bound_to_the_instance_is_taken():
    model, x = nn.Sequential(nn.Linear(48, 48), nn.Linear(48, 48)).eval(), random_(3, 48)
    model.forward = types.MethodType(lambda self, x: self[1](self[0](x)) + 1, model)
    result = compressed(model, x)
    twin = dense_twin(model, result.model, result.plan)
    torch.testing.assert_close(run(result.model, x), run(twin, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["lstm", "encoder", "vocoder", "experts"])
def test_a_network_made_under_inference_mode_is_compressed_to_one_that_can_be_trained(name: str):
    packed = PACKED[name]
    with torch.inference_mode():
        model, inputs = packed.made(), copied(packed.inputs)
    result = compressed(model, inputs, params=0.55)
    assert result.plan.decomposed
    assert not any(tensor.is_inference() for tensor in result.model.state_dict(keep_vars=True).values())
    output_of(result.model(*arguments_of(packed.inputs)[0])).sum().backward()


def test_weights_that_are_tied_by_their_data_are_decomposed_once(tmp_path: Path):
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 48))
        model[2].weight.data = model[0].weight.data
        return model.eval()

    x = random_(3, 48)
    result = compressed(build(), x)
    (layer,) = result.plan.decomposed
    assert (layer.name, layer.aliases) == ("0", ("2",))
    assert result.model[0][0].weight is result.model[2][0].weight
    assert result.after == cost_of(result.model, x)
    assert same(run(load(save(result, tmp_path / "out"), build()), x), run(result.model, x))


class Scaled(nn.Module):
    """A tensor that is no leaf of a graph, and another that is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 48))
        self.log_scale = nn.Parameter(torch.zeros(48))
        self.scale = self.log_scale.exp() * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.scale


def test_tensors_that_are_no_leaves_go_over():
    model, x = Scaled().eval(), random_(3, 48)
    result = compressed(model, x)
    assert torch.equal(result.model.scale, model.scale)
    assert model.scale.grad_fn is not None
    assert result.after == cost_of(result.model, x)


def test_random_numbers_in_forward_are_the_same_in_every_pass():
    def forward(s: Run, x: Tensor) -> Tensor:
        x = functional.dropout(s.a(x), 0.3, training=True) + 0.1 * torch.randn_like(x)
        return s.rnn(x)[0]

    torch.manual_seed(0)
    model, x = Run(forward, a=nn.Linear(48, 48), rnn=nn.GRU(48, 32)).eval(), random_(5, 2, 48)
    state = torch.random.get_rng_state()
    result = compressed(model, x)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert "rnn" in result.plan.opened
    assert result.plan.to_json() == compressed(model, x).plan.to_json()


def test_inputs_that_forward_changes_stay_as_they_were():
    def forward(s: Run, x: Tensor) -> Tensor:
        return s.rnn(s.a(x.mul_(0.5)))[0]

    torch.manual_seed(0)
    model = Run(forward, a=nn.Linear(48, 48), rnn=nn.GRU(48, 32)).eval()
    x, batches = random_(5, 2, 48), [random_(5, 2, 48) + k for k in range(2)]
    kept = [one.clone() for one in (x, *batches)]
    result = compressed(model, x, calibration=batches)
    assert all(torch.equal(one, other) for one, other in zip((x, *batches), kept, strict=True))
    assert result.after == cost_of(result.model, x)


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")], ids=["parallel", "compiled"]
)
def test_a_wrapper_is_taken_off(wrap: Any, tmp_path: Path):
    packed = PACKED["encoder"]
    result = compressed(wrap(packed.made()), packed.inputs)
    bare = compressed(packed.made(), packed.inputs)
    assert type(result.model) is Run
    assert result.plan.layers == bare.plan.layers
    loaded = load(save(result, tmp_path / "out"), wrap(packed.made(seed=1)))
    assert same(run(loaded, packed.inputs), run(bare.model, packed.inputs))


# MACs that depend on the data


class Router(nn.Module):
    """A small expert and a large one, between which what comes in decides."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate = nn.Linear(32, 32), nn.Linear(32, 2)
        self.small, self.large = nn.Linear(32, 32), nn.Sequential(nn.Linear(32, 96), nn.ReLU(), nn.Linear(96, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        chosen, out = self.gate(x).argmax(-1), x.clone()
        for number, expert in enumerate((self.small, self.large)):
            out[chosen == number] = expert(x[chosen == number])
        return out


@pytest.mark.parametrize(("include", "share"), [(["first"], 0.945), (["first", "small"], 0.82)], ids=["one", "several"])
def test_macs_that_depend_on_the_data_are_told_and_measured(include: list[str], share: float, tmp_path: Path):
    torch.manual_seed(0)
    model, x = Router().eval(), random_(64, 32)
    result = compressed(model, x, params=share, include=include)
    assert layers_in(result.plan, "first")
    assert result.plan.settings["macs_depend_on_data"] is True
    assert result.after == cost_of(result.model, x)
    assert result.after.params <= share * result.before.params
    loaded = load(save(result, tmp_path / "out"), Router())
    assert cost_of(loaded, x) == result.after


def test_macs_of_a_network_that_takes_one_path_do_not_depend_on_the_data(results: dict):
    for name in ("lstm", "encoder", "vocoder"):
        assert "macs_depend_on_data" not in result_of(results, name).plan.settings


def test_experts_of_one_size_cost_the_same_wherever_rows_go():
    torch.manual_seed(0)
    result = compressed(Experts().eval(), random_(64, 32), params=0.4)
    assert "macs_depend_on_data" not in result.plan.settings
    assert result.after == cost_of(result.model, random_(64, 32) + 1)
