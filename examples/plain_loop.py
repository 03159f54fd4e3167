"""A plain training loop: a small convolutional network on scikit-learn's digits."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import densreg

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--coeff", type=float, default=0.1, help="weight of the penalty; 0 is plain cross-entropy")
args = parser.parse_args()

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # [1797, 1, 8, 8], pixels in [0, 1]
labels = torch.tensor(digits.target)
train, test = TensorDataset(images[:1500], labels[:1500]), TensorDataset(images[1500:], labels[1500:])
loader = DataLoader(train, batch_size=64, shuffle=True, drop_last=True)

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1),
    nn.BatchNorm2d(16),
    nn.ReLU(),
    nn.Conv2d(16, 32, 3, stride=2, padding=1),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(32 * 4 * 4, 10),
)
# compile=True, the default, makes the step one compiled graph. It is faster, but the first step then takes a minute or
# more, which pays off from some hundreds of steps on.
objective = densreg.RegularizedObjective(model, coeff=args.coeff, compile=False)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

for epoch in range(3):
    model.train()
    for x, y in loader:
        out = objective(x, y)  # (loss, logits, ce, penalty)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()

    model.eval()
    x, y = test.tensors
    with torch.no_grad():
        accuracy = (model(x).argmax(1) == y).float().mean()
    print(f"epoch {epoch + 1}: test accuracy {accuracy:.3f}, test penalty {objective.penalty(x):.3f}")
