"""The plan: for every layer its decomposition and ranks, or why it was left alone.

Frozen records and their JSON form. This is the one language that all stages speak; it can be read, edited
and costed without torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from rankfold.budget import Cost
from rankfold.decompositions.wiring import LayerShape, Wiring
from rankfold.errors import PlanError

FORMAT = "rankfold-plan"
INTERPOLATIVE = "interpolative"
"""What the decomposition is called that leaves channels out, beside those of a layer's weight."""
KNOWN_PLAN = "rankfold_plan"
"""The attribute in which a model that was compressed or loaded keeps its plan."""
VERSION = 3
"""Version of the form that is written; older ones, without `narrowings` or `opened`, are read as well."""


Times = Callable[["LayerShape", "Wiring | None", Sequence[Any]], Any]
"""Nanoseconds that a layer takes in its network: of a shape, dense or with the ranks of a wiring."""


@dataclass(frozen=True)
class LayerSpec:
    """A layer that can be decomposed, as found in a network; `weight` is the weight's shape as the module has it.

    `aliases` are the other qualified names at which the same weight is used (a shared module, or a tied weight): they
    are replaced together with `name` and share its factors. `times` is there where time matters.
    """

    name: str
    kind: str
    shape: LayerShape
    dtype: str
    itemsize: int
    weight: tuple[int, ...]
    aliases: tuple[str, ...] = ()
    times: Times | None = field(default=None, compare=False, repr=False)

    def cost(self, shape: LayerShape, wiring: Wiring | None = None, ranks: Sequence[int] = ()) -> Cost:
        """The layer's cost at some shape, dense or as factors; biases never change and are left out."""
        params = wiring.params(shape, ranks) if wiring else shape.params
        macs = wiring.macs(shape, ranks) if wiring else shape.macs
        latency = self.times(shape, wiring, ranks) if self.times else 0
        return Cost(int(params), int(macs), int(params) * self.itemsize, int(latency))

    @cached_property
    def dense(self) -> Cost:
        """Cost of the layer as it is."""
        return self.cost(self.shape)


@dataclass(frozen=True)
class Port:
    """A place where channels enter or leave a layer.

    Of a layer's outputs the channels are `size` rows from `start` on; of its inputs, `inner` columns each.
    """

    layer: str
    start: int = 0
    inner: int = 1


@dataclass(frozen=True)
class ChannelSet:
    """A hidden activation, as found in a network: `size` channels that `producers` make and only `consumers` read.

    Every module or parameter in `between` works channel by channel: depthwise convolutions, batch norms, slopes and
    scales, at their qualified names. Where layers are grouped, every one of `parts` equal runs of channels has to keep
    as many. `through` is the cost of what is in between, biases of the producers included.
    """

    name: str
    size: int
    producers: tuple[Port, ...]
    consumers: tuple[Port, ...]
    between: tuple[str, ...] = ()
    parts: int = 1
    through: Cost = field(default_factory=lambda: Cost(0, 0, 0))

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of all layers that give or take the channels, each once."""
        return tuple(dict.fromkeys(port.layer for port in (*self.producers, *self.consumers)))


def channels_named(layer: str) -> str:
    """What the channels that a layer reads are called beside layers: in reasons, and where they are refused."""
    return f"inputs of {layer}"


@dataclass(frozen=True)
class Narrowing:
    """Which channels of a hidden activation are kept, in rising order; the others are rebuilt by what reads them.

    `predicted_error` is the squared relative error of the first consumer's output; costs are those of what works
    channel by channel.
    """

    channels: ChannelSet
    kept: tuple[int, ...]
    before: Cost
    after: Cost
    predicted_error: float = 0.0

    @property
    def name(self) -> str:
        """What the channels are called: the layer that reads them."""
        return self.channels.name


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer: a decomposition with a rank per bond, or `decomposition=None`, kept dense.

    `predicted_error` is the squared relative error the search saw, `error` that of the factors in the model, both in
    the metric of the plan; costs are the weight's alone. `starts` is from how many starts the factors are fitted.
    `narrowed` is the weight's shape once channels are gone, before it is decomposed; empty where none are.
    """

    name: str
    kind: str
    weight: tuple[int, ...]
    decomposition: str | None
    ranks: tuple[int, ...]
    before: Cost
    after: Cost
    aliases: tuple[str, ...] = ()
    predicted_error: float = 0.0
    error: float = 0.0
    starts: int = 1
    narrowed: tuple[int, ...] = ()

    @property
    def dense(self) -> tuple[int, ...]:
        """The shape of the weight that is decomposed, or left dense."""
        return self.narrowed or self.weight


@dataclass(frozen=True)
class Plan:
    """A whole network's plan.

    `skipped` maps each weight-carrying layer that was not considered to the reason. `settings` says how the plan came
    about (search, budget, decompositions, objective and bound); `source` where the network came from, when it is known.
    `opened` says of packed modules that layers lie in how they are opened (`rankfold.network.opening`), `narrowings`
    which channels of hidden activations are kept; both come before layers are replaced.
    """

    layers: tuple[LayerPlan, ...]
    skipped: Mapping[str, str]
    before: Cost
    after: Cost
    settings: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    opened: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    narrowings: tuple[Narrowing, ...] = ()

    @property
    def decomposed(self) -> tuple[LayerPlan, ...]:
        """The layers that are replaced by factors."""
        return tuple(layer for layer in self.layers if layer.decomposition is not None)

    @property
    def changed(self) -> tuple[LayerPlan, ...]:
        """The layers that are replaced by factors, or have fewer channels."""
        return tuple(layer for layer in self.layers if layer.decomposition is not None or layer.narrowed)

    @property
    def touched(self) -> frozenset[str]:
        """The names of the layers whose weights are others: those that are changed, or rebuild channels that went."""
        readers = {port.layer for one in self.narrowings for port in one.channels.consumers}
        return frozenset(readers | {layer.name for layer in self.changed})

    def with_layers(self, layers: tuple[LayerPlan, ...]) -> Plan:
        """The same plan with other layer entries."""
        return replace(self, layers=layers)

    def to_json(self) -> str:
        """The plan as JSON text, closed by a checksum over its content."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "before": self.before.as_dict(),
            "after": self.after.as_dict(),
            "settings": dict(self.settings),
            "source": dict(self.source),
            "layers": [_layer_to_dict(layer) for layer in self.layers],
            "skipped": dict(self.skipped),
            "opened": {name: dict(opening) for name, opening in self.opened.items()},
            "narrowings": [asdict(narrowing) for narrowing in self.narrowings],
        }
        return json.dumps({**content, "sha256": _digest(content)}, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan in `text`. Raises PlanError for anything but a complete, unaltered plan of a known version."""
        try:
            content = json.loads(text)
        except ValueError as error:
            raise PlanError(f"the plan is not complete JSON ({error}); it was cut off or edited by hand") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise PlanError(f"this is not a plan: its 'format' is not {FORMAT!r}")
        if content.get("version") not in (1, 2, VERSION):
            raise PlanError(
                f"the plan has version {content.get('version')!r}, this rankfold reads {VERSION}; "
                "use the rankfold that wrote it, or compress again"
            )
        digest = content.pop("sha256", None)
        if digest != _digest(content):
            raise PlanError("the plan's checksum does not match its content: it was altered after it was written")
        try:
            return cls(
                layers=tuple(_layer_from_dict(layer) for layer in content["layers"]),
                skipped=dict(content["skipped"]),
                before=Cost(**content["before"]),
                after=Cost(**content["after"]),
                settings=content["settings"],
                source=content["source"],
                opened=content.get("opened", {}),
                narrowings=tuple(_narrowing_from_dict(entry) for entry in content.get("narrowings", ())),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"the plan lacks or misspells a field: {error!r}") from None


def _digest(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _layer_to_dict(layer: LayerPlan) -> dict[str, Any]:
    return {**vars(layer), "before": layer.before.as_dict(), "after": layer.after.as_dict()}


def _layer_from_dict(entry: Mapping[str, Any]) -> LayerPlan:
    values: dict[str, Any] = {
        **entry,
        "weight": tuple(int(size) for size in entry["weight"]),
        "ranks": tuple(int(rank) for rank in entry["ranks"]),
        "aliases": tuple(entry["aliases"]),
        "narrowed": tuple(entry.get("narrowed", ())),
        "before": Cost(**entry["before"]),
        "after": Cost(**entry["after"]),
    }
    return LayerPlan(**values)


def _narrowing_from_dict(entry: Mapping[str, Any]) -> Narrowing:
    channels = dict(entry["channels"])
    made, read = (tuple(Port(**port) for port in channels.pop(name)) for name in ("producers", "consumers"))
    through, between = Cost(**channels.pop("through")), tuple(channels.pop("between"))
    return Narrowing(
        ChannelSet(producers=made, consumers=read, between=between, through=through, **channels),
        tuple(int(one) for one in entry["kept"]),
        Cost(**entry["before"]),
        Cost(**entry["after"]),
        float(entry["predicted_error"]),
    )
