"""A compiled step of one's own: forward, penalty, double backward and the parameters' gradients as one graph."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import densreg

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # [1797, 1, 8, 8], pixels in [0, 1]
train = TensorDataset(images, torch.tensor(digits.target))
loader = DataLoader(train, batch_size=64, shuffle=True, drop_last=True)  # each new shape would compile again

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1),
    nn.ReLU(),
    nn.Conv2d(16, 32, 3, stride=2, padding=1),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(32 * 4 * 4, 10),
)
parameters = list(model.parameters())
optimizer = torch.optim.AdamW(parameters, lr=3e-3)


def step(x, y):
    with densreg.fast_second_order():
        loss, ce, penalty = densreg.density_loss(model(x), y, x, coeff=0.1)
        # In the same graph: nothing is kept for a second one, and the loss's gradient in x is never computed.
        return ce.detach(), penalty.detach(), torch.autograd.grad(loss, parameters)


compiled = torch.compile(step, fullgraph=True)

for epoch in range(3):
    for x, y in loader:
        # x must require grad before it enters, and Dynamo must be told to trace torch.autograd.grad.
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            ce, penalty, gradients = compiled(x.requires_grad_(), y)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    print(f"epoch {epoch + 1}: cross-entropy {ce:.3f}, penalty {penalty:.3f}")
