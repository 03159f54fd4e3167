"""A regularizer of one's own: the norm of the Jacobian of the logits (Hoffman, Roberts and Yaida, 2019)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import densreg


@dataclass(frozen=True)
class JacobianNorm:
    """C * ||v^T J||_2^2 with v uniform on the unit sphere: an unbiased estimate of the squared Frobenius norm of J."""

    name: ClassVar[str] = "jacobian_norm"
    precise: ClassVar[bool] = False  # whether its forwards are to run in float32 under autocast
    projections: int = 1

    def __call__(self, classify, logits, xs, target):
        """One value for each sample, [B]; xs is a tuple of inputs, and classify(xs) would be another forward."""
        total = torch.zeros_like(logits[:, 0])
        for _ in range(self.projections):
            v = F.normalize(torch.randn_like(logits))
            gradients = torch.autograd.grad((v * logits).sum(), xs, create_graph=True)
            total = total + sum(g.flatten(1).square().sum(1) for g in gradients)
        return logits.shape[1] / self.projections * total


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
objective = densreg.RegularizedObjective(model, coeff=0.01, regularizer=JacobianNorm(projections=2), compile=False)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

for epoch in range(3):
    for x, y in loader:
        out = objective(x, y)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    print(f"epoch {epoch + 1}: cross-entropy {out.ce:.3f}, penalty {out.penalty:.3f}")
