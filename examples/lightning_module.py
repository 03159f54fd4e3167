"""PyTorch Lightning, with saving and loading."""

import tempfile

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import densreg


class Classifier(lightning.LightningModule):
    def __init__(self, coeff: float = 0.1, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 10),
        )
        self.objective = densreg.RegularizedObjective(model, coeff, compile=torch.cuda.is_available())

    def forward(self, x):
        return self.objective.model(x)

    def training_step(self, batch, _):
        out = self.objective(*batch)
        self.log_dict({"ce": out.ce, "penalty": out.penalty}, prog_bar=True)
        return out.loss

    def validation_step(self, batch, _):
        x, y = batch
        self.log("accuracy", (self(x).argmax(1) == y).float().mean(), prog_bar=True)
        self.log("test_penalty", self.objective.penalty(x))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.hparams.lr)


torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # [1797, 1, 8, 8], pixels in [0, 1]
labels = torch.tensor(digits.target)
train, test = TensorDataset(images[:1500], labels[:1500]), TensorDataset(images[1500:], labels[1500:])

with tempfile.TemporaryDirectory() as folder:
    trainer = lightning.Trainer(max_epochs=3, default_root_dir=folder, logger=False)
    trainer.fit(Classifier(), DataLoader(train, 64, shuffle=True, drop_last=True), DataLoader(test, len(test)))
    trainer.save_checkpoint(f"{folder}/model.ckpt")
    classifier = Classifier.load_from_checkpoint(f"{folder}/model.ckpt")
    trainer.validate(classifier, DataLoader(test, len(test)))
