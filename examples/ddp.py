"""DistributedDataParallel on one machine, NCCL on GPUs and gloo on CPUs: torchrun --nproc-per-node 2 examples/ddp.py"""

import argparse
import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import densreg

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", help="file for the model's weights")
args = parser.parse_args()

cuda = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
if cuda:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if cuda else "gloo")

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # [1797, 1, 8, 8], pixels in [0, 1]
train = TensorDataset(images, torch.tensor(digits.target))
sampler = DistributedSampler(train, drop_last=True)
loader = DataLoader(train, batch_size=64 // dist.get_world_size(), sampler=sampler, drop_last=True)

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1),
    nn.ReLU(),
    nn.Conv2d(16, 32, 3, stride=2, padding=1),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(32 * 4 * 4, 10),
).to(device)
# The objective is wrapped, not the model; the model keeps its own names in the state_dict.
ddp = DistributedDataParallel(densreg.RegularizedObjective(model, coeff=0.1, compile=cuda))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

for epoch in range(3):
    sampler.set_epoch(epoch)
    for x, y in loader:
        out = ddp(x.to(device), y.to(device))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    if dist.get_rank() == 0:
        print(f"epoch {epoch + 1}: cross-entropy {out.ce:.3f}, penalty {out.penalty:.3f}")

if args.out and dist.get_rank() == 0:
    torch.save(model.state_dict(), args.out)
dist.destroy_process_group()
