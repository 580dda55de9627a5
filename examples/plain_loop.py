"""Fine-tune a language model reversibly in a loop of your own, and save it as a plain one.

python examples/plain_loop.py MODEL        a folder that save_pretrained wrote, or a name on the Hub
"""

import sys
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import autorev

LENGTH = 128
"""Tokens in a row."""


def main(model_folder: str, steps: int = 50, learning_rate: float = 2e-5, out: str = "trained") -> None:
    """Train on CPython's language reference, a row of it in each step."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    ids = torch.tensor(tokenizer("\n\n".join(topics.values()), verbose=False).input_ids)
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)

    print(autorev.convert(model))  # what became reversible, what did not and why

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for step in range(steps):
        row = rows[step % len(rows)][None]
        loss = model(input_ids=row, labels=row, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.3f}")
    print("drift:", autorev.drift(model))  # 0.0: every activation was rebuilt bit for bit

    autorev.revert(model)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"saved to {out}: a plain model, which transformers loads without autorev")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
