"""Fine-tune a language model reversibly with transformers' Trainer, and save it as a plain one.

python examples/trainer.py MODEL        a folder that save_pretrained wrote, or a name on the Hub
"""

import sys
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import autorev
from autorev.finetuning.callback import ReversibleCallback

LENGTH = 128
"""Tokens in a row."""


def main(model_folder: str, steps: int = 50, learning_rate: float = 2e-5, out: str = "trained") -> None:
    """Train on CPython's language reference."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    ids = torch.tensor(tokenizer("\n\n".join(topics.values()), verbose=False).input_ids)
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)

    print(autorev.convert(model))  # before the Trainer is made; no gradient_checkpointing beside it

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=out,
            max_steps=steps,
            per_device_train_batch_size=1,
            learning_rate=learning_rate,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            include_num_input_tokens_seen="all",
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
    )
    ReversibleCallback().attach(trainer)  # adds seconds, tokens, side bits, drift and peak memory to what is logged
    trainer.train()
    print("drift:", autorev.drift(model))  # 0.0: every activation was rebuilt bit for bit

    autorev.revert(model)
    trainer.save_model(out)
    tokenizer.save_pretrained(out)
    print(f"saved to {out}: a plain model, which transformers loads without autorev")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
