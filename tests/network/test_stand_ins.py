"""Stand-ins compute what the modules do that they stand for."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

from rankfold.decompositions import fit, reconstruct, wiring_of
from rankfold.network.factorised import Factorised
from rankfold.network.kinds import base_of, factorised, kind_of, shape_of, stage_weights, weight_of
from rankfold.network.passes import evaluating, tensors_in
from rankfold.network.stand_ins.attention import Attention, is_self_attention
from rankfold.network.stand_ins.recurrent import Recurrent
from rankfold.network.stand_ins.stack import Stack
from rankfold.network.stand_ins.weight import NotPlainError, computed, computes_weight
from rankfold.sources.models import complete_torchvision

complete_torchvision()
timm_layers = pytest.importorskip("timm.layers")

both = pytest.mark.parametrize

BATCH, QUERIES, KEYS, EMBED, HEADS = 3, 4, 5, 12, 3


def random_(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shuffled_(module: nn.Module) -> nn.Module:
    """The module with random numbers in all its parameters, biases among them, in double precision."""
    for number, parameter in enumerate(module.double().parameters()):
        parameter.data = random_(*parameter.shape, seed=100 + number) / 3
    return module


def assert_same(given: Any, wanted: Any) -> None:
    given, wanted = tensors_in(given), tensors_in(wanted)
    assert [one.shape for one in given] == [one.shape for one in wanted]
    for one, other in zip(given, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9, equal_nan=True)


# attention


def masks(queries: int, keys: int, batch: int | None) -> Iterator[dict[str, Any]]:
    """Every kind of mask together with every kind of padding; no query is left without a key."""
    hidden = torch.ones(queries, keys).triu(1).bool()
    many = random_((batch or 1) * HEADS, queries, keys, seed=7) > 0.5
    many[..., 0] = False
    attention = [None, hidden, random_(queries, keys, seed=5), many, many.double().masked_fill(many, float("-inf"))]
    padded = torch.zeros(batch or 1, keys, dtype=torch.bool)
    padded[-1, -2:] = True
    padding = [None, padded, random_(batch or 1, keys, seed=6)]
    for mask, one in itertools.product(attention, padding):
        yield {"attn_mask": mask, "key_padding_mask": one if one is None or batch else one[0]}


WANTED = ({}, {"average_attn_weights": False}, {"need_weights": False})


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@both("batch_first", [True, False])
@both("sizes", [{}, {"kdim": 7, "vdim": 9}], ids=["packed", "separate"])
@both("bias", [True, False])
@both("add_bias_kv", [True, False])
@both("add_zero_attn", [True, False])
def test_attention_is_that_of_torch(
    batch_first: bool, sizes: dict[str, int], bias: bool, add_bias_kv: bool, add_zero_attn: bool
):
    options = {"bias": bias, "add_bias_kv": add_bias_kv, "add_zero_attn": add_zero_attn, "batch_first": batch_first}
    module = shuffled_(nn.MultiheadAttention(EMBED, HEADS, **options, **sizes))
    crossed = [
        random_(BATCH, n, e, seed=n + e) for n, e in ((QUERIES, EMBED), (KEYS, module.kdim), (KEYS, module.vdim))
    ]
    calls: list[tuple[list[Tensor], int | None]] = [(crossed, BATCH), ([one[0] for one in crossed], None)]
    if not sizes:
        x = random_(BATCH, KEYS, EMBED)
        y = random_(BATCH, KEYS, EMBED, seed=1)
        calls += [([x, x, x], BATCH), ([x[0]] * 3, None), ([y, x, x], BATCH)]
    turns = itertools.cycle(itertools.product(range(15), WANTED))
    for _ in range(sum(2**k * bool(flag) for k, flag in enumerate((batch_first, bias, add_bias_kv, add_zero_attn)))):
        next(turns)
    for packed in (True, False) if not sizes else (False,):
        stand_in = Attention(module, packed=packed)
        for inputs, batch in calls:
            if batch and not batch_first:
                turned = {id(one): one.transpose(0, 1) for one in inputs}
                inputs = [turned[id(one)] for one in inputs]
            axis = 1 if batch and batch_first else 0
            given = list(masks(inputs[0].shape[axis], inputs[1].shape[axis], batch))
            for number, wanted in itertools.islice(turns, 0, 28, 4):
                options = {**given[number], **wanted}
                assert_same(stand_in(*inputs, **options), module(*inputs, **options))


@both("need_weights", [True, False])
def test_causal_attention_is_that_of_torch(need_weights: bool):
    module, x = shuffled_(nn.MultiheadAttention(EMBED, HEADS, batch_first=True)), random_(BATCH, KEYS, EMBED)
    stand_in = Attention(module, packed=True)
    mask = nn.Transformer.generate_square_subsequent_mask(KEYS, dtype=torch.float64)
    options = {"attn_mask": mask, "is_causal": True, "need_weights": need_weights}
    assert_same(stand_in(x, x, x, **options), module(x, x, x, **options))
    for one in (module, stand_in):
        with pytest.raises(RuntimeError, match="(?i)need attn_mask"):
            one(x, x, x, is_causal=True, need_weights=need_weights)


def test_attention_to_nothing_is_that_of_torch():
    module, x = shuffled_(nn.MultiheadAttention(EMBED, HEADS, batch_first=True)), random_(BATCH, KEYS, EMBED)
    padded = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padded[1] = True
    for wanted in WANTED:
        options = {"key_padding_mask": padded, **wanted}
        assert_same(Attention(module, packed=True)(x, x, x, **options), module(x, x, x, **options))


def test_attention_is_that_of_the_fused_kernel():
    module, x = shuffled_(nn.MultiheadAttention(EMBED, HEADS, batch_first=True)).eval(), random_(BATCH, KEYS, EMBED)
    with torch.inference_mode():
        for wanted in WANTED:
            assert_same(Attention(module, packed=True)(x, x, x, **wanted), module(x, x, x, **wanted))


@both("wanted", WANTED)
def test_attention_drops_out_and_learns_as_that_of_torch(wanted: dict[str, bool]):
    module = shuffled_(nn.MultiheadAttention(EMBED, HEADS, dropout=0.3, batch_first=True)).train()
    stand_in, x = Attention(copy.deepcopy(module), packed=True), random_(BATCH, KEYS, EMBED)
    outputs = []
    for one in (stand_in, module):
        torch.manual_seed(0)
        outputs.append(one(x, x, x, **wanted))
        outputs[-1][0].square().sum().backward()
    assert_same(*outputs)
    torch.testing.assert_close(stand_in.in_proj.weight.grad, module.in_proj_weight.grad)
    torch.testing.assert_close(stand_in.in_proj.bias.grad, module.in_proj_bias.grad)
    torch.testing.assert_close(stand_in.out_proj.weight.grad, module.out_proj.weight.grad)


@both("packed", [True, False])
def test_attention_has_the_attributes_and_the_packed_tensors_of_torch_s(packed: bool):
    module = nn.MultiheadAttention(EMBED, HEADS, dropout=0.1, add_zero_attn=True).eval()
    stand_in = Attention(module, packed=packed)
    for name in ("embed_dim", "kdim", "vdim", "num_heads", "head_dim", "dropout", "batch_first", "add_zero_attn"):
        assert getattr(stand_in, name) == getattr(module, name)
    assert torch.equal(stand_in.in_proj_bias, module.in_proj_bias)
    assert stand_in.out_proj is module.out_proj
    assert stand_in.training is False
    if packed:
        assert stand_in.in_proj_weight.data_ptr() == module.in_proj_weight.data_ptr()


@both("packed", [True, False])
def test_what_is_frozen_stays_so_in_an_attention(packed: bool):
    module = nn.MultiheadAttention(EMBED, HEADS)
    module.in_proj_weight.requires_grad_(False)
    weights = [one for name, one in Attention(module, packed=packed).named_parameters() if "weight" in name]
    assert [one.requires_grad for one in weights] == [*[False] * (1 if packed else 3), True]


def test_attention_of_one_tensor_to_itself_is_told_by_identity():
    x = random_(2, 2)
    assert is_self_attention((x, x, x))
    assert not is_self_attention((x, x, x.clone()))
    assert not is_self_attention((x,))


# recurrent layers

INPUTS, HIDDEN, STEPS = 5, 4, 6
KINDS = {
    "lstm": (nn.LSTM, {}),
    "projected": (nn.LSTM, {"proj_size": 3}),
    "gru": (nn.GRU, {}),
    "tanh": (nn.RNN, {"nonlinearity": "tanh"}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
}


def states(module: nn.RNNBase, *batch: int) -> Any:
    """Random states to start from."""
    count = module.num_layers * (1 + module.bidirectional)
    made = [random_(count, *batch, width, seed=width) for width in (module.proj_size or HIDDEN, HIDDEN)]
    return tuple(made) if isinstance(module, nn.LSTM) else made[0]


@both("kind", KINDS)
@both("layers", [1, 2])
@both("bidirectional", [True, False])
@both("bias", [True, False])
@both("batch_first", [True, False])
def test_recurrent_layers_are_those_of_torch(
    kind: str, layers: int, bidirectional: bool, bias: bool, batch_first: bool
):
    cls, options = KINDS[kind]
    made = cls(INPUTS, HIDDEN, layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional, **options)
    module = shuffled_(made)
    stand_in = Recurrent(module)
    x = random_(BATCH, STEPS, INPUTS)
    lengths = torch.tensor([4, 6, 2])
    sequences: list[tuple[Any, Any]] = [
        (x if batch_first else x.transpose(0, 1), states(module, BATCH)),
        (x[0], states(module)),
        (pack_sequence([x[0], x[1, :4], x[2, :1]]), states(module, BATCH)),
        (pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False), states(module, BATCH)),
    ]
    for given, state in sequences:
        assert_same(stand_in(given), module(given))
        assert_same(stand_in(given, state), module(given, state))
        assert_same(stand_in(input=given, hx=state), module(given, state))
        if isinstance(given, PackedSequence):
            found, wanted = stand_in(given)[0], module(given)[0]
            assert_same([one for one in found if one is not None], [one for one in wanted if one is not None])


@both("kind", KINDS)
@both("bidirectional", [True, False])
def test_recurrent_layers_have_the_attributes_and_the_gradients_of_torch_s(kind: str, bidirectional: bool):
    cls, options = KINDS[kind]
    module = shuffled_(cls(INPUTS, HIDDEN, 2, bidirectional=bidirectional, **options))
    stand_in, x = Recurrent(copy.deepcopy(module)), random_(STEPS, BATCH, INPUTS)
    for name, parameter in module.named_parameters():
        assert torch.equal(getattr(stand_in, name), parameter)
    for name in (
        "mode",
        "input_size",
        "hidden_size",
        "num_layers",
        "bias",
        "batch_first",
        "bidirectional",
        "proj_size",
    ):
        assert getattr(stand_in, name) == getattr(module, name)
    with pytest.raises(AttributeError):
        stand_in.weight_ih  # noqa: B018
    stand_in.flatten_parameters()
    for one in (stand_in, module):
        one(x)[0].square().sum().backward()
    ways = 1 + bidirectional
    for layer in range(2):
        for way, end in zip(range(ways), ("", "_reverse"), strict=False):
            gradient = stand_in.inputs[layer].weight.grad.chunk(ways)[way]
            torch.testing.assert_close(gradient, getattr(module, f"weight_ih_l{layer}{end}").grad)
            other = getattr(stand_in, f"weight_hh_l{layer}{end}").grad
            torch.testing.assert_close(other, getattr(module, f"weight_hh_l{layer}{end}").grad)


def test_recurrent_layers_drop_out_in_training_alone():
    module = shuffled_(nn.GRU(INPUTS, HIDDEN, 2, dropout=0.9))
    stand_in, x = Recurrent(module), random_(STEPS, BATCH, INPUTS)
    assert_same(stand_in.eval()(x), module.eval()(x))
    torch.manual_seed(0)
    assert not torch.equal(stand_in.train()(x)[0], stand_in(x)[0])


def in_factors(layer: nn.Module, rank: int) -> Factorised:
    wiring = wiring_of("svd", shape_of(layer))
    factors = fit("svd", weight_of(layer), shape_of(layer), (rank,))
    return factorised(layer, wiring, (rank,), stage_weights(layer, wiring, factors))


@both("kind", KINDS)
@both("bidirectional", [True, False])
def test_recurrent_layers_in_factors_are_those_of_the_weights_they_stand_for(kind: str, bidirectional: bool):
    cls, options = KINDS[kind]
    module = shuffled_(cls(INPUTS, HIDDEN, 2, bidirectional=bidirectional, **options))
    stand_in, x = Recurrent(module), random_(STEPS, BATCH, INPUTS)
    stand_in.inputs = nn.ModuleList(in_factors(layer, 2) for layer in stand_in.inputs)
    twin = copy.deepcopy(module)
    for name, parameter in twin.named_parameters():
        parameter.data = getattr(stand_in, name).detach()
    lengths = torch.tensor([4, 6, 2])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    for given in (x, x[:, 0], packed):
        assert_same(stand_in(given), twin(given))
    assert not torch.equal(twin.weight_ih_l0, module.weight_ih_l0)


def test_hooks_see_what_the_inputs_of_a_recurrent_layer_meet():
    stand_in, seen = Recurrent(shuffled_(nn.LSTM(INPUTS, HIDDEN, 2))), []
    for layer in stand_in.inputs:
        layer.register_forward_hook(lambda one, args, output: seen.append((args[0].shape, output.shape)))
    stand_in(random_(STEPS, BATCH, INPUTS))
    gates = (STEPS, BATCH, 4 * HIDDEN)
    assert seen == [((STEPS, BATCH, INPUTS), gates), ((STEPS, BATCH, HIDDEN), gates)]


# computed weights


def pruned(module: nn.Module) -> nn.Module:
    prune.l1_unstructured(module, "weight", 0.5)
    return module


def pruned_rows(module: nn.Module) -> nn.Module:
    prune.ln_structured(module, "weight", 0.5, n=2, dim=0)
    return module


def pruned_bias(module: nn.Module) -> nn.Module:
    prune.random_unstructured(pruned(module), "bias", 0.5)
    return module


COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm-old": torch.nn.utils.weight_norm,
    "weight_norm-old-whole": lambda module: torch.nn.utils.weight_norm(module, dim=None),
    "spectral_norm": parametrizations.spectral_norm,
    "spectral_norm-old": torch.nn.utils.spectral_norm,
    "pruned": pruned,
    "pruned-rows": pruned_rows,
    "pruned-bias": pruned_bias,
}
LAYERS = {
    "linear": (lambda: nn.Linear(9, 7), (3, 9)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), padding="same", dilation=2, padding_mode="reflect"), (2, 4, 9, 8)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, stride=(2, 1)), (2, 4, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5, 5)),
}


def plain_of(module: nn.Module) -> nn.Module:
    with evaluating(module), torch.no_grad():
        return computed(module, base_of(module))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@both("way", COMPUTED)
@both("layer", LAYERS)
def test_a_layer_of_a_computed_weight_is_a_stock_one_around_it(way: str, layer: str):
    torch.manual_seed(0)
    build, shape = LAYERS[layer]
    module = COMPUTED[way](build())
    with torch.no_grad():
        for _ in range(3):
            module(torch.randn(shape))  # spectral norms take a step with every call in training
    module.eval()
    assert computes_weight(module)
    made, x = plain_of(module), torch.randn(shape)
    assert type(made) is type(build())
    assert kind_of(made) is not None
    assert not computes_weight(made)
    assert isinstance(made.weight, nn.Parameter)
    torch.testing.assert_close(made(x), module(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.weight, module.weight, rtol=1e-5, atol=1e-6)
    assert made.weight.requires_grad
    assert not any(name.endswith(("_orig", "_g", "_v", "_u")) for name in made.state_dict())


@both("cls", ["StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame", "Conv2dSame"])
@both("kernel", [1, 2, 3, 5])
@both("stride", [1, 2, 3])
@both("dilation", [1, 2])
def test_convolutions_of_timm_are_stock_ones_around_their_weights(cls: str, kernel: int, stride: int, dilation: int):
    torch.manual_seed(0)
    options = {"stride": stride, "dilation": dilation}
    module = getattr(timm_layers, cls)(4, 6, kernel, **options).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    if stride == 3 and cls in ("StdConv2d", "ScaledStdConv2d"):
        module.padding = (1, 0)  # rows alone
    made = plain_of(module)
    (conv,) = [one for one in made.modules() if kind_of(one) is not None]
    assert type(conv) is nn.Conv2d
    for height, width in itertools.product((12, 13, 14, 15, 16, 17), (13, 16)):
        x = torch.randn(2, 4, height, width)
        torch.testing.assert_close(made(x), module(x), rtol=1e-3, atol=1e-3)


@both("way", ["weight_norm", "spectral_norm", "pruned"])
def test_what_is_frozen_stays_so_in_a_layer_of_a_computed_weight(way: str):
    made = plain_of(COMPUTED[way](nn.Linear(9, 7)).requires_grad_(False))
    assert not any(one.requires_grad for one in made.parameters())


class Written(nn.Linear):
    """A product that is written out."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self.weight) + self.bias


def test_a_product_that_is_written_otherwise_is_a_stock_layer_around_its_weight():
    module, x = Written(9, 7), torch.randn(3, 9)
    made = plain_of(module)
    assert type(made) is nn.Linear
    assert made.weight is module.weight
    torch.testing.assert_close(made(x), module(x))


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


class OfSquares(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.square())


class OfSize(nn.Conv1d):
    """A weight that depends on the size of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv1d(x, self.weight * x.shape[-1], self.bias)


@both("module", [Doubled(6, 6), Twice(6, 6), OfSquares(6, 6), OfSize(3, 4, 3)], ids=lambda one: type(one).__name__)
def test_what_computes_something_else_is_no_layer_with_a_weight(module: nn.Module):
    with pytest.raises(NotPlainError):
        plain_of(module)


# stacks


@both("sizes", [(3, 9, 12), (2, 10, 10)], ids=["oblong", "square"])
@both("call", [(7,), (2, 3)], ids=["rows", "batches"])
def test_products_with_matrices_of_a_stack_are_those_with_the_tensor_s(sizes: tuple[int, ...], call: tuple[int, ...]):
    weight, bias = nn.Parameter(random_(*sizes)), random_(sizes[1], seed=2)
    x, y = random_(*call, sizes[2], seed=1), random_(*call, sizes[1], seed=1)
    for index in (1, torch.tensor(0), -1):
        matrix = weight[index]
        rows = [
            lambda m: functional.linear(x, m),
            lambda m: functional.linear(x, m, bias),
            lambda m: functional.linear(x, m, bias=bias),
            lambda m: x @ m.T,
            lambda m: x @ m.mT,
            lambda m: torch.matmul(x, m.t()),
            lambda m: x.matmul(m.transpose(0, 1)),
            lambda m: x @ m.transpose(-1, -2),
            lambda m: functional.linear(x, m.to(torch.float64)),
            lambda m: functional.linear(x.to(m.dtype), m),
        ]
        columns = [lambda m: y @ m, lambda m: torch.matmul(y, m), lambda m: functional.linear(y, m.T)]
        if len(call) == 1:
            rows += [lambda m: torch.mm(x, m.T)]
            columns += [lambda m: torch.mm(y, m), lambda m: y.mm(m)]
        for products, by_rows in ((rows, True), (columns, False)):
            for product in products:
                stack = Stack(weight)
                assert_same(product(stack[index]), product(matrix))
                assert stack.by_rows is by_rows


@both("by_rows", [True, False])
def test_products_with_factors_of_a_stack_are_those_with_the_tensor_they_stand_for(by_rows: bool):
    stack = Stack(nn.Parameter(random_(4, 9, 12)), by_rows)
    stages = in_factors(stack, 3)
    whole, x = stages.weight, random_(5, 12 if by_rows else 9, seed=1)
    assert stages.shape == whole.shape == stack.shape
    assert (stages.dtype, stages.device, stages.by_rows) == (stack.dtype, stack.device, by_rows)
    for index in range(4):
        product = functional.linear(x, whole[index]) if by_rows else x @ whole[index]
        found = functional.linear(x, stages[index]) if by_rows else x @ stages[index]
        assert_same(found, product)


@both("made", [Stack, lambda weight: in_factors(Stack(weight, True), 3)], ids=["whole", "factors"])
def test_a_stack_is_multiplied_in_one_way_alone(made: Any):
    stack, x = made(nn.Parameter(random_(3, 8, 8))), random_(2, 8)
    functional.linear(x, stack[0])
    with pytest.raises(TypeError, match="both as they are and transposed"):
        torch.matmul(x, stack[1])
    with pytest.raises(TypeError):
        x @ stack[1]


@both("use", [lambda m, x: m + 1, lambda m, x: m @ x, lambda m, x: x * m, lambda m, x: torch.einsum("ab,cb->ac", x, m)])
def test_a_matrix_of_a_stack_can_only_be_multiplied_by(use: Any):
    matrix = Stack(nn.Parameter(random_(3, 8, 8)))[0]
    with pytest.raises((TypeError, AttributeError)):
        use(matrix, random_(8, 8))


def test_factors_of_a_stack_are_those_of_its_matrices():
    stack = Stack(nn.Parameter(random_(3, 9, 12)), True)
    wiring = wiring_of("svd", shape_of(stack))
    factors = fit("svd", weight_of(stack), shape_of(stack), (4,))
    for number in range(3):
        alone = nn.Linear(12, 9, dtype=torch.float64)
        alone.weight.data = stack.weight[number].detach()
        own = fit("svd", weight_of(alone), shape_of(alone), (4,))
        whole = reconstruct(wiring, tuple(factor[number : number + 1] for factor in factors))
        assert_same(whole, reconstruct(wiring, own))


def test_no_warning_comes_of_a_stand_in():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = random_(BATCH, KEYS, EMBED)
        Attention(nn.MultiheadAttention(EMBED, HEADS, dtype=torch.float64), packed=True)(x, x, x)
        Recurrent(nn.LSTM(EMBED, HIDDEN, dtype=torch.float64))(x)
