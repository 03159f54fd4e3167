"""A timm model with mixup and CutMix: soft targets through criterion=."""

import timm
import torch
from sklearn.datasets import load_digits
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch.utils.data import DataLoader, TensorDataset

import densreg

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # [1797, 1, 8, 8], pixels in [0, 1]
labels = torch.tensor(digits.target)
train, test = TensorDataset(images[:1500], labels[:1500]), TensorDataset(images[1500:], labels[1500:])
loader = DataLoader(train, batch_size=64, shuffle=True, drop_last=True)

# A vision transformer, made small for 8x8 images; pretrained=True works as well.
model = timm.create_model(
    "vit_tiny_patch16_224", img_size=8, patch_size=4, in_chans=1, embed_dim=96, depth=2, num_classes=10
).to(device)
mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, prob=0.5, label_smoothing=0.1, num_classes=10)
objective = densreg.RegularizedObjective(
    model,
    coeff=0.1,
    criterion=SoftTargetCrossEntropy(),  # (logits, target) -> loss; the penalty itself needs no target
    compile=device == "cuda",
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

for epoch in range(3):
    model.train()
    for x, y in loader:
        x, y = mixup(x.to(device), y.to(device))  # y: [B] -> [B, 10]
        out = objective(x, y)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()

    model.eval()
    x, y = (t.to(device) for t in test.tensors)
    with torch.no_grad():
        accuracy = (model(x).argmax(1) == y).float().mean()
    print(f"epoch {epoch + 1}: test accuracy {accuracy:.3f}, test penalty {objective.penalty(x):.3f}")
