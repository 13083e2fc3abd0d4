"""Several processes that work on one network: each does a share of the parts, and all get what all have done.

The parts are done as one process would do them, and put together in their order, so that every process comes to the
same plan and the same factors, bit for bit where all are machines of one kind with as many threads. What is not shared
(passes in forward order, the search) is done by all alike. A process group is used where there is one, as `torchrun`
with Accelerate or `torch.distributed.init_process_group` makes it; results go between its processes as PyTorch's object
collectives send them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from rankfold.errors import RankfoldError

Item = TypeVar("Item")
Made = TypeVar("Made")


def place() -> tuple[int, int]:
    """The number of this process among those of its group, and how many there are; 0 of 1 without a group."""
    if not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def owned(number: int) -> bool:
    """Whether this process does the part of this number."""
    rank, processes = place()
    return number % processes == rank


def shared(
    items: Sequence[Item],
    work: Callable[[Item], Made],
    report: Callable[[int, int], None],
    *,
    packed: Callable[[Made], Any] = lambda made: made,
    unpacked: Callable[[Item, Any], Made] = lambda item, sent: sent,
    device: torch.device | str = "cpu",
) -> list[Made]:
    """What `work` makes of every item, in their order, each done by one process, which reports how far it is.

    `packed` is what is sent of it, and `unpacked` makes the same of that for an item, its tensors on `device`. Where
    the work of one process fails, all raise its error.
    """

    def made(number: int) -> Made:
        report(number, len(items))
        return work(items[number])

    own: dict[int, Made] = {}
    failed: RankfoldError | None = None
    try:
        own = {number: made(number) for number in range(len(items)) if owned(number)}
    except RankfoldError as error:
        failed = error
    alone = place()[1] == 1
    message = None if failed is None else str(failed)
    sent = [] if alone else everywhere((message, {number: packed(one) for number, one in own.items()}), device)
    if failed is not None:
        raise failed
    for message, _ in sent:
        if message is not None:
            raise RankfoldError(message)
    if items:
        report(len(items), len(items))
    others = {number: one for _, part in sent for number, one in part.items()}
    return [own[k] if k in own else unpacked(item, others[k]) for k, item in enumerate(items)]


def everywhere(value: Any, device: torch.device | str = "cpu") -> list[Any]:
    """The values that all processes give, in their order; tensors in those of others come to lie on `device`."""
    rank, processes = place()
    if processes == 1:
        return [value]
    found: list[Any] = [None] * processes
    distributed.all_gather_object(found, _placed(value, "cpu"))
    return [value if number == rank else _placed(one, device) for number, one in enumerate(found)]


def _placed(value: Any, device: torch.device | str) -> Any:
    """The same value with its tensors on a device, in mappings, sequences and the package's own records."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _placed(one, device) for name, one in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_placed(one, device) for one in value)
    if type(value).__module__.startswith("rankfold.") and hasattr(value, "__dict__"):
        made = copy.copy(value)
        vars(made).update({name: _placed(one, device) for name, one in vars(value).items()})
        return made
    return value
