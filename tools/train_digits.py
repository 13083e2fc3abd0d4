"""Trains the embedded default: DigitsNet on scikit-learn's digits; writes weights and held-out digits to the package.

    python tools/train_digits.py

1,797 images of 8×8; every fifth, stratified and shuffled with seed 0, is held out (360) and never trained on. About a
minute on two cores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

from rankfold.sources.zoo.digits import DigitsNet

ASSETS = Path(__file__).resolve().parents[1] / "src" / "rankfold" / "assets"
EPOCHS, BATCH, SEED = 60, 64, 0


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to one pixel."""
    padded = functional.pad(x, (1, 1, 1, 1))
    down, right = (int(torch.randint(0, 3, (1,), generator=generator)) for _ in range(2))
    return padded[:, :, down : down + x.shape[2], right : right + x.shape[3]]


def main() -> None:
    """Trains, evaluates on the held-out digits, and writes the two files."""
    digits: Any = load_digits()
    images = (digits.images * 255 / 16).round().astype(np.uint8)
    train_x, test_x, train_y, test_y = train_test_split(
        images, digits.target, test_size=360, stratify=digits.target, random_state=SEED
    )
    x, y = torch.from_numpy(train_x)[:, None].float() / 255, torch.from_numpy(train_y)
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model = DigitsNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    steps = EPOCHS * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(x), generator=generator).split(BATCH):
            loss = nn.functional.cross_entropy(model(shifted(x[chosen], generator)), y[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        right = (model(torch.from_numpy(test_x)[:, None].float() / 255).argmax(1).numpy() == test_y).sum()
    print(f"held-out digits: {right} of {len(test_y)} right ({100 * right / len(test_y):.2f} %)")
    ASSETS.mkdir(exist_ok=True)
    save_file(model.state_dict(), ASSETS / "digits.safetensors", {"source": "tools/train_digits.py"})
    np.savez_compressed(ASSETS / "digits_test.npz", x=test_x, y=test_y.astype(np.int64))


if __name__ == "__main__":
    main()
