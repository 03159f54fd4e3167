"""CIFAR-100 with a ResNet-18 and the density penalty: cifar100_plain.py with three lines changed."""

import argparse
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms as T

import densreg

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data-dir", type=Path, help="folder with cifar-100-python; without it, noise of its shape")
parser.add_argument("--epochs", type=int, help="200, or 1 of noise")
parser.add_argument("--batch-size", type=int, default=128)
parser.add_argument("--out", default="cifar100.pt", help="file for the weights")
args = parser.parse_args()
epochs = args.epochs or (200 if args.data_dir else 1)
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)

normalize = [T.ToTensor(), T.Normalize((0.507, 0.487, 0.441), (0.267, 0.256, 0.276))]
augment = [T.RandomCrop(32, padding=4), T.RandomHorizontalFlip()]
if args.data_dir:
    train = torchvision.datasets.CIFAR100(args.data_dir, train=True, transform=T.Compose(augment + normalize))
    test = torchvision.datasets.CIFAR100(args.data_dir, train=False, transform=T.Compose(normalize))
else:
    train = test = torchvision.datasets.FakeData(2 * args.batch_size, (3, 32, 32), 100, T.Compose(normalize))
train_loader = DataLoader(train, args.batch_size, shuffle=True, drop_last=True, pin_memory=device == "cuda")
test_loader = DataLoader(test, args.batch_size)

model = torchvision.models.resnet18(num_classes=100)
model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)  # for small images
model.maxpool = nn.Identity()
model = model.to(device, memory_format=torch.channels_last)
# x is normalized here, not in pixels: 0.1 acts like 0.03 in pixels.
objective = densreg.RegularizedObjective(model, coeff=0.1, compile=device == "cuda")
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [epochs // 2, epochs * 7 // 8])

for epoch in range(epochs):
    model.train()
    for x, y in train_loader:
        x, y = x.to(device, memory_format=torch.channels_last), y.to(device)
        loss = objective(x, y).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scheduler.step()

    model.eval()
    correct = 0
    with torch.no_grad():
        for x, y in test_loader:
            correct += (model(x.to(device)).argmax(1).cpu() == y).sum().item()
    print(f"epoch {epoch + 1}: loss {loss:.3f}, test accuracy {correct / len(test):.4f}")
torch.save(model.state_dict(), args.out)
