"""Mixed precision: autocast in bfloat16, or in float16 with a scaled loss."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import densreg

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
args = parser.parse_args()
device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, args.dtype)

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
).to(device)
objective = densreg.RegularizedObjective(model, coeff=0.1, compile=device == "cuda")
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
one = torch.ones((), device=device)

for epoch in range(3):
    for x, y in loader:
        x, y = x.to(device), y.to(device)
        with torch.autocast(device, dtype):
            # The gradients are computed in this call, so float16 needs the scale here. bfloat16 would not need it.
            out = objective(x, y, loss_scale=scaler.scale(one))
        optimizer.zero_grad()
        scaler.scale(out.loss).backward()
        scaler.step(optimizer)
        scaler.update()
    print(f"epoch {epoch + 1}: cross-entropy {out.ce:.3f}, penalty {out.penalty:.3f}, scale {scaler.get_scale():g}")
