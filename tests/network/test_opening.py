"""What is opened does what it did, or stays closed with the reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from packed_networks import PACKED, Experts, Run, random_, tagger
from torch import Tensor, nn
from torch.nn import functional

from rankfold.network.copies import duplicate, is_compiled
from rankfold.network.costs import cost_of
from rankfold.network.finding import find_layers
from rankfold.network.kinds import LAYER_KINDS, kind_of
from rankfold.network.opening import open_, opened, within
from rankfold.network.passes import run, tensors_in
from rankfold.network.stand_ins.stack import Stack

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor"),
]
each_network = pytest.mark.parametrize("name", PACKED)


def assert_close(given: Any, wanted: Any) -> None:
    given, wanted = tensors_in(given), tensors_in(wanted)
    assert len(given) == len(wanted) > 0
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def everything_of(model: nn.Module) -> dict[str, Any]:
    """Types of modules and identities of tensors, by name."""
    modules = {f"module {name}": type(module) for name, module in model.named_modules()}
    return {**modules, **{name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}}


@each_network
def test_an_opened_network_gives_the_same_outputs(name: str):
    packed = PACKED[name]
    model = packed.made()
    wanted = run(model, packed.inputs)
    whole = opened(model, packed.inputs)
    assert {place: one["form"] for place, one in whole.openings.items()} == packed.forms
    assert not whole.closed
    assert_close(run(whole.model, packed.inputs), wanted)
    again = open_(duplicate(model), whole.openings)
    assert_close(run(again, packed.inputs), wanted)


@each_network
def test_opening_leaves_the_network_as_it_is(name: str):
    packed = PACKED[name]
    model = packed.made().train()
    before, values = everything_of(model), copy.deepcopy(list(model.state_dict().values()))
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    opened(model, packed.inputs)
    assert everything_of(model) == before
    for tensor, value in zip(model.state_dict().values(), values, strict=True):
        assert torch.equal(tensor, value)
    assert all(module.training for module in model.modules())
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


@each_network
def test_every_opened_module_has_a_layer_that_is_found_and_called(name: str):
    packed = PACKED[name]
    model = packed.made()
    whole = opened(model, packed.inputs)
    found = find_layers(whole.model, packed.inputs, closed=whole.closed).found
    for place in packed.forms:
        inside = [layer for layer in found if f"{layer.name}.".startswith(f"{place}.")]
        assert inside
        for layer in inside:
            assert layer.shape.calls
            assert kind_of(whole.model.get_submodule(layer.name)).module in LAYER_KINDS


@each_network
def test_openings_are_told_in_types_of_json(name: str):
    packed = PACKED[name]
    for opening in opened(packed.made(), packed.inputs).openings.values():
        assert all(isinstance(value, (str, bool)) for value in opening.values())


@pytest.mark.parametrize("name", ["lstm", "encoder", "gru-of-lengths"])
def test_an_opened_network_costs_what_the_network_does(name: str):
    packed = PACKED[name]
    model = packed.made()
    assert cost_of(opened(model, packed.inputs).model, packed.inputs) == cost_of(model, packed.inputs)


def test_an_opened_network_shares_the_numbers_of_the_original():
    model = tagger(num_layers=2).eval()
    whole = opened(model, torch.arange(12).reshape(2, 6)).model
    with torch.no_grad():
        model.rnn.weight_ih_l1.fill_(7)
    assert bool((whole.rnn.inputs[1].weight == 7).all())


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Sloped(nn.Conv1d):
    """What it does depends on the numbers that come in."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x.std()


class Flat(nn.LSTM):
    """An LSTM whose weights something else reads as one block."""


CLOSED: dict[str, tuple[nn.Module, str]] = {
    "doubled": (Run(lambda s, x: s.part(x), part=Doubled(32, 32)), "something else"),
    "sloped": (Run(lambda s, x: s.part(x.mT).mT, part=Sloped(32, 32, 1)), "something else"),
    "read": (
        Run(lambda s, x: s.part(x)[0] * s.part._flat_weights[0].mean(), part=Flat(32, 32)),
        "does not run once it is opened: 'Recurrent' object has no attribute '_flat_weights'",
    ),
    "asked": (
        Run(
            lambda s, x: s.part(x, x, x)[0] * isinstance(s.part, nn.MultiheadAttention),
            part=nn.MultiheadAttention(32, 4),
        ),
        "something else",
    ),
}


@pytest.mark.parametrize("name", CLOSED)
def test_what_would_compute_something_else_stays_closed_with_the_reason_and_the_rest_is_opened(name: str):
    torch.manual_seed(0)
    odd, reason = CLOSED[name]
    model, x = nn.Sequential(nn.GRU(32, 32), Run(lambda s, pair: s.odd(pair[0]), odd=odd)).eval(), random_(5, 2, 32)
    whole = opened(model, x)
    assert set(whole.openings) == {"0"}
    assert set(whole.closed) == {"1.odd.part"}
    assert reason in whole.closed["1.odd.part"]
    assert "\n" not in whole.closed["1.odd.part"]
    assert type(whole.model.get_submodule("1.odd.part")) is type(odd.part)
    assert_close(run(whole.model, x), run(model, x))
    layers = find_layers(whole.model, x, closed=whole.closed)
    assert layers.skipped["1.odd.part"] == whole.closed["1.odd.part"]


class Own(nn.MultiheadAttention):
    """An attention with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x, x)[0].square()


def test_a_subclass_with_a_forward_of_its_own_is_no_packed_module():
    model = Run(lambda s, x: s.part(x), part=Own(32, 4)).eval()
    assert not opened(model, random_(5, 2, 32)).openings


class OwnLSTM(nn.LSTM):
    pass


def test_a_subclass_with_the_forward_of_its_base_is_opened_as_that():
    model, x = Run(lambda s, x: s.part(x)[0], part=OwnLSTM(32, 16)).eval(), random_(5, 2, 32)
    whole = opened(model, x)
    assert whole.openings == {"part": {"form": "recurrent"}}
    assert_close(run(whole.model, x), run(model, x))


@pytest.mark.parametrize(
    "use",
    [
        lambda x, w: torch.einsum("bi,nio->bo", x, w),
        lambda x, w: torch.bmm(x.expand(3, -1, -1), w).sum(0),
        lambda x, w: x @ w.mean(0),
        lambda x, w: x @ w[1] + x @ w[2].T,
        lambda x, w: x @ (w[0] + w[1]),
    ],
    ids=["einsum", "bmm", "mean", "both-ways", "sum"],
)
def test_a_tensor_that_is_used_as_a_whole_is_no_stack(use: Any):
    def forward(s: Run, x: Tensor) -> Tensor:
        return s.out(use(x, s.w))

    model, x = Run(forward, w=nn.Parameter(torch.randn(3, 16, 16)), out=nn.Linear(16, 16)).eval(), random_(5, 16)
    whole = opened(model, x)
    assert not whole.openings
    assert not whole.closed
    assert torch.equal(run(whole.model, x), run(model, x))


@pytest.mark.parametrize("shape", [(1, 32, 32), (4, 32, 7), (4, 5, 32), (32, 32)], ids=str)
def test_tensors_of_other_axes_are_no_stacks(shape: tuple[int, ...]):
    model = Run(lambda s, x: x + s.w.sum(), w=nn.Parameter(torch.randn(shape))).eval()
    assert not opened(model, random_(5, 32)).openings


def test_both_uses_of_a_stack_are_told_apart_by_running():
    whole = opened(PACKED["experts"].made(), PACKED["experts"].inputs)
    assert whole.openings == {"up": {"form": "stack", "by_rows": False}, "down": {"form": "stack", "by_rows": True}}
    assert isinstance(whole.model.up, Stack)
    assert whole.model.up.weight.shape == (4, 32, 48)


def test_attentions_that_meet_others_have_a_layer_for_each_projection():
    packed = PACKED["decoder"]
    whole = opened(packed.made(), packed.inputs)
    for name, opening in whole.openings.items():
        assert opening["packed"] is name.endswith("self_attn")
        names = {one for one, _ in whole.model.get_submodule(name).named_children()}
        assert names == ({"in_proj", "out_proj"} if opening["packed"] else {"q_proj", "k_proj", "v_proj", "out_proj"})


def test_compiled_parts_are_opened_wherever_they_are():
    inner = torch.compile(nn.Linear(32, 32), backend="eager")
    model, x = nn.Sequential(nn.Sequential(inner, nn.Tanh()), nn.Linear(32, 32)).eval(), random_(3, 32)
    whole = opened(model, x)
    assert whole.openings == {"0.0": {"form": "compiled"}}
    assert type(whole.model.get_submodule("0.0")) is nn.Linear
    assert whole.model.get_submodule("0.0").weight is inner._orig_mod.weight
    assert is_compiled(model[0][0])
    assert within(whole.openings, ["1"]) == whole.openings


def test_openings_are_kept_of_what_layers_lie_in():
    openings = {name: {"form": "recurrent"} for name in ("a", "a.b", "ab", "c.up")}
    assert set(within(openings, ["a.inputs.0"])) == {"a"}
    assert set(within(openings, ["c.up"])) == {"c.up"}
    assert set(within(openings, ["a.b", "d"])) == {"a", "a.b"}
    assert not within(openings, [])
    assert set(within({"": {"form": "recurrent"}}, ["inputs.0"])) == {""}


@pytest.mark.parametrize("module", [nn.LSTM(32, 16), nn.GRU(32, 16, bidirectional=True)], ids=["lstm", "gru"])
def test_a_model_that_is_one_packed_module_is_opened_as_a_whole(module: nn.Module):
    x = random_(5, 2, 32)
    whole = opened(module.eval(), x)
    assert whole.openings == {"": {"form": "recurrent"}}
    assert_close(run(whole.model, x), run(module, x))


SHARED: dict[str, Any] = {
    "lstm": lambda: nn.LSTM(32, 16, bidirectional=True),
    "weight-norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(32, 32)),
    "attention": lambda: Run(lambda s, x: s.part(x, x.flip(0), x)[0], part=nn.MultiheadAttention(32, 4)),
    "experts": lambda: Run(lambda s, x: s.part(x.flatten(0, 1)).reshape(x.shape), part=Experts()),
    "compiled": lambda: torch.compile(nn.Linear(32, 32), backend="eager"),
}


@pytest.mark.parametrize("kind", SHARED)
def test_a_packed_module_under_two_names_stays_one(kind: str):
    def forward(s: Run, x: Tensor) -> Tensor:
        for part in (s.a, s.b):
            x = part(x)
            x = x[0] if isinstance(x, tuple) else x
        return x

    shared = SHARED[kind]()
    model, x = Run(forward, a=shared, b=shared).eval(), random_(5, 2, 32)
    whole = opened(model, x)
    assert len(whole.openings) == (2 if kind == "experts" else 1)
    assert whole.model.a is whole.model.b
    assert_close(run(whole.model, x), run(model, x))
    assert cost_of(whole.model, x).params <= cost_of(model, x).params


def test_tensors_that_are_not_run_stay_as_they_are():
    class Idle(Experts):
        def forward(self, x: Tensor) -> Tensor:
            return functional.relu(self.gate(x))

    whole = opened(Idle().eval(), random_(5, 32))
    assert not whole.openings
    assert isinstance(whole.model.up, nn.Parameter)
