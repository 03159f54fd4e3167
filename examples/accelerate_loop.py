"""Hugging Face Accelerate, with saving and loading: accelerate launch examples/accelerate_loop.py"""

import tempfile

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import densreg

accelerator = Accelerator()
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
objective = densreg.RegularizedObjective(model, coeff=0.1, compile=accelerator.device.type == "cuda")
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
# The objective is prepared, not the model, so that DistributedDataParallel goes around both.
objective, optimizer, loader = accelerator.prepare(objective, optimizer, loader)

for epoch in range(3):
    for x, y in loader:
        out = objective(x, y)
        optimizer.zero_grad()
        accelerator.backward(out.loss)
        optimizer.step()
    accelerator.print(f"epoch {epoch + 1}: cross-entropy {out.ce:.3f}, penalty {out.penalty:.3f}")

with tempfile.TemporaryDirectory() as folder:
    # To resume from: weights, the objective's number of steps, optimizer, random states.
    accelerator.save_state(folder)
    accelerator.load_state(folder)
    accelerator.save(model.state_dict(), f"{folder}/model.pt")  # to use: under the model's own names
    model.load_state_dict(torch.load(f"{folder}/model.pt"))
