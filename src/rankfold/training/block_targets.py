"""What the original's blocks give, as a target for all of a student's blocks at once.

Descent on outputs alone learns what a few hundred inputs happen to be sure of. Residual blocks and transformer layers
give thousands of numbers for every input, and a student that comes close to all of them, with gradients through the
whole network, does so on other inputs too (FitNets, arXiv 1412.6550, for one layer; here for all, with nothing between
a block and its target, as both are of one size).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from rankfold.calibration.positions import position_weights, weighted_square
from rankfold.network.blocks import find_blocks, first_tensor, norms_behind
from rankfold.network.hooks import attached
from rankfold.network.passes import Inputs, examples_in, few, run
from rankfold.plan import Plan

WHOLE = ""
"""The name that PyTorch gives the whole network among its modules."""


@dataclass(frozen=True)
class BlockTarget:
    """How a block's outputs are compared: `energy` is the mean square of what the original's gives for an example.

    `weights` are those of its places, where they count unequally.
    """

    energy: float
    weights: Tensor | None

    def distance(self, own: Tensor, theirs: Tensor, examples: int) -> Tensor:
        """The squared error of a student's block, relative to the energy."""
        return weighted_square((own - theirs).float(), self.weights) / (examples * self.energy)


def block_targets(
    teacher: nn.Module, student: nn.Module, plan: Plan, batches: Sequence[Inputs]
) -> Mapping[str, BlockTarget]:
    """The blocks around what `plan` changed, by name, and what their outputs are like on some inputs.

    Blocks are those that refining finds (`rankfold.network.blocks`), with the batch norms right behind them;
    where there are none, the whole network.
    """
    (one,) = few(batches, 1)
    found = list(find_blocks(teacher, student, one, plan.touched))
    behind = norms_behind(teacher, found, one)
    blocks = [behind.get(name, name) for name in found] or [WHOLE]
    weights = position_weights(teacher, blocks, batches)
    energies = dict.fromkeys(blocks, 0.0)

    def watch(name: str) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            energies[name] += float(weighted_square(cast(Tensor, first_tensor(output)).float(), weights.get(name)))

        return note

    with attached(teacher.get_submodule(name).register_forward_hook(watch(name)) for name in blocks):
        for batch in batches:
            run(teacher, batch)
    count = sum(map(examples_in, batches))
    return {name: BlockTarget(max(energies[name], 1e-30) / count, weights.get(name)) for name in blocks}
