"""What tools that only decompose give: every layer the same fraction, weights alone, nothing fitted to inputs.

ResNet-20 on CIFAR-10 test by SVD, Tucker-2, CP and its tensor train, at 50, 30 and 20 % of the MACs. `--only
DECOMPOSITION:KEPT` runs some. The factors are those of the closed forms and of alternating least squares that other
libraries have; the tests compare them with TensorLy's.
"""

from __future__ import annotations

import torch
from common import accuracy_record, keep, network, parser, require_data

from rankfold import Budget, compress
from rankfold.evaluation import accuracy

CASES = tuple(f"{name}:{kept}" for name in ("svd", "tucker", "tt", "cp") for kept in (0.5, 0.3, 0.2))


def main() -> None:
    """Writes a record of every case, or of those asked for."""
    made = parser(__doc__ or "")
    made.add_argument("--only", action="append", help="DECOMPOSITION:KEPT (repeatable)")
    arguments = made.parse_args()
    source, scored = network(require_data(arguments), "cifar10_resnet20", "cifar10_resnet20", "cifar10/test.npz")
    base = accuracy(source.model, scored)
    for case in arguments.only or CASES:
        decomposition, kept = case.split(":")
        result = compress(
            source.model,
            torch.zeros(1, 3, 32, 32),
            decomposition=decomposition,
            budget=Budget(macs=float(kept)),
            search="uniform",
            calibration="none",
        )
        values = {"case": case, "model": "cifar10_resnet20", "data": "CIFAR-10 test", "budget": float(kept)}
        keep([accuracy_record(decomposition, result, accuracy(result.model, scored), base, **values)])


if __name__ == "__main__":
    main()
