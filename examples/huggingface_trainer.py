"""A Hugging Face model and its Trainer: a small module takes keyword inputs, and output= picks the logits."""

import tempfile

import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import densreg


class Penalized(nn.Module):
    """Takes what the Trainer hands over, by keyword, and returns what it reads."""

    def __init__(self, objective: densreg.RegularizedObjective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, pixel_values, labels):
        out = self.objective(pixel_values, labels)
        return {"loss": out.loss, "logits": out.logits}


def accuracy(prediction):
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}


torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # [1797, 1, 8, 8], pixels in [0, 1]
examples = [{"pixel_values": x, "labels": y} for x, y in zip(images, torch.tensor(digits.target), strict=True)]
train, test = examples[:1500], examples[1500:]

# Random weights; ViTForImageClassification.from_pretrained(...) works as well.
shape = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 10}
size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = ViTForImageClassification(ViTConfig(**shape, **size))
compiled = torch.cuda.is_available()
objective = densreg.RegularizedObjective(model, coeff=0.1, output=lambda output: output.logits, compile=compiled)

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        num_train_epochs=3,
        learning_rate=2e-3,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=64,
        dataloader_drop_last=True,
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(Penalized(objective), arguments, None, train, test, compute_metrics=accuracy)
    trainer.train()
    print(trainer.evaluate())
    model.save_pretrained(folder)
    model = ViTForImageClassification.from_pretrained(folder)
