"""An epoch with and without the penalty, timed by pytest-benchmark: python -m pytest examples/epoch_benchmark.py"""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import densreg


@pytest.mark.parametrize("step", ["cross-entropy", "functions", "objective", "interval 4"])
def test_epoch(benchmark, step):
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # [1797, 1, 8, 8], pixels in [0, 1]
    train = TensorDataset(images, torch.tensor(digits.target))
    loader = DataLoader(train, batch_size=64, shuffle=True, drop_last=True)

    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    interval = 4 if step == "interval 4" else 1
    objective = densreg.RegularizedObjective(model, coeff=0.1, interval=interval, compile=False)

    def loss_of(x, y):
        if step == "cross-entropy":
            return nn.functional.cross_entropy(model(x), y)
        if step == "functions":
            x.requires_grad_()
            return densreg.density_loss(model(x), y, x, coeff=0.1)[0]
        return objective(x, y).loss

    def epoch():
        for x, y in loader:
            loss = loss_of(x, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss

    loss = benchmark.pedantic(epoch, rounds=5, warmup_rounds=1)
    assert loss.isfinite()
