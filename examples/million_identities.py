"""A million synthetic identities over processes: torchrun --nproc-per-node 2 examples/million_identities.py"""

import argparse
import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import densreg.distributed

parser = argparse.ArgumentParser(description=__doc__)
for name, default in (("classes", 1_000_000), ("seen", 128), ("features", 64), ("batch-size", 64), ("steps", 10)):
    parser.add_argument(f"--{name}", type=int, default=default)
args = parser.parse_args()

cuda = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
if cuda:
    torch.cuda.set_device(device)
dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
SCALE = 32  # of the cosines


class Recognition(nn.Sequential):
    def forward(self, x, y, shard):
        h, weight = SCALE * F.normalize(super().forward(x)), F.normalize(shard)
        options = {"margin": lambda s: s - 0.35 * SCALE, "classes": args.classes}  # CosFace
        return densreg.distributed.linear_density_loss(h, weight, None, y, x, coeff=0.1, **options)


torch.manual_seed(0)  # the same trunk in all processes
trunk = Recognition(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, args.features)).to(device)
ddp = DistributedDataParallel(trunk)  # averages the trunk's gradients; the shards stay out of it
identities = torch.randint(args.classes, (args.seen,), device=device)  # those that these few steps see
faces = torch.randn(args.seen, 256, device=device)
torch.manual_seed(1 + rank)  # each process has its own part of the head, and of the data
first, end = (args.classes * r // world for r in (rank, rank + 1))
shard = nn.Parameter(torch.randn(end - first, args.features, device=device))
optimizer = torch.optim.SGD([*ddp.parameters(), shard], lr=1.0)

for step in range(args.steps):
    begin = time.perf_counter()
    drawn = torch.randint(args.seen, (args.batch_size // world,), device=device)
    x = (faces[drawn] + 0.1 * torch.randn(len(drawn), 256, device=device)).requires_grad_()
    loss, ce, penalty = ddp(x, identities[drawn], shard)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    means = torch.stack([ce.detach(), penalty.detach()]) / world
    dist.all_reduce(means)
    ce, penalty = means.tolist()
    if rank == 0:
        print(f"step {step + 1}: cross-entropy {ce:.3f}, penalty {penalty:.3f}, {time.perf_counter() - begin:.1f} s")
dist.destroy_process_group()
