"""A Hugging Face text classifier: the score with respect to the word embeddings, passed by keyword beside a mask."""

import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

import densreg

torch.manual_seed(0)
# Synthetic sentences: which of the words 5 and 6 is in it? Position 0 is [CLS]; what follows the end is masked.
tokens, labels = torch.randint(7, 50, (1024, 12)), torch.randint(2, (1024,))
lengths = torch.randint(4, 13, (1024, 1))
tokens[:, 0] = 1
tokens.scatter_(1, torch.randint(1, 4, (1024, 1)), labels.unsqueeze(1) + 5)
masks = (torch.arange(12) < lengths).long()
loader = DataLoader(TensorDataset(tokens, masks, labels), batch_size=64, shuffle=True, drop_last=True)

size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
model = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=2, **size))  # random weights
embedding = model.get_input_embeddings()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

for epoch in range(5):
    correct = 0
    for input_ids, attention_mask, y in loader:
        # RegularizedObjective detaches its inputs. The functions do not, so x may be computed, here from weights that
        # are trained too. fast_second_order gives attention a second derivative.
        with densreg.fast_second_order():
            x = embedding(input_ids)
            output = model(inputs_embeds=x, attention_mask=attention_mask, labels=y)
            penalty = densreg.density_penalty(output.logits, x)
            loss = output.loss + 0.1 * penalty
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        correct += (output.logits.argmax(1) == y).sum().item()
    print(f"epoch {epoch + 1}: penalty {penalty:.3f}, training accuracy {correct / len(labels):.3f}")
