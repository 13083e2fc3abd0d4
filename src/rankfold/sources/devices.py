"""The device that a user names."""

from __future__ import annotations

import os

import torch

from rankfold.errors import ModelError, reason_of


def open_device(name: str) -> torch.device:
    """The device called `name`, such as cpu or cuda:1; with auto, a CUDA GPU where there is one.

    Of several processes that `torchrun` started, each has one of its own.

    Raises ModelError for one that is not there.
    """
    if name == "auto":
        number = os.environ.get("LOCAL_RANK", "0")
        return torch.device(f"cuda:{number}" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float64, device=device).item()  # some devices have no such numbers
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise ModelError(f"device {name!r} cannot be used here: {reason_of(error)}; give cpu, or auto") from None
    return device
