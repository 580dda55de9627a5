"""Train on preferences reversibly with trl's DPOTrainer, all weights or LoRA adapters; save the model as a plain one.

python examples/dpo.py MODEL [--lora]        a folder that save_pretrained wrote, or a name on the Hub
"""

import sys
from pydoc_data.topics import topics

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import autorev
from autorev.finetuning.callback import ReversibleCallback


def main(
    model_folder: str, lora: bool = False, steps: int = 50, learning_rate: float = 1e-6, out: str = "trained"
) -> None:
    """Train to prefer the explanation that CPython's language reference gives to the one of another topic."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    names, texts = list(topics), [text[:200] for text in topics.values()]
    pairs = [
        {"prompt": f"Explain {name}.\n", "chosen": right, "rejected": wrong}
        for name, right, wrong in zip(names, texts, texts[1:] + texts[:1], strict=True)
    ]

    print(autorev.convert(model))  # before the trainer is made

    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=out,
            max_steps=steps,
            max_length=96,
            per_device_train_batch_size=2,
            learning_rate=learning_rate,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            gradient_checkpointing=False,  # trl's default; reversible blocks need none
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
    )
    # Converts the reference model that the trainer has loaded (with adapters there is none: it is the model without
    # them), so that the first loss is ln 2; and adds seconds, side bits, drift and peak memory to what is logged.
    ReversibleCallback().attach(trainer)
    trainer.train()
    print("drift:", autorev.drift(trainer.model))  # 0.0: every activation was rebuilt bit for bit

    autorev.revert(trainer.model)
    trained = trainer.model.merge_and_unload() if lora else trainer.model
    trained.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"saved to {out}: a plain model, which transformers loads without autorev")


if __name__ == "__main__":
    options = sys.argv[1:]
    if not options or options[1:] not in ([], ["--lora"]):
        sys.exit(__doc__)
    main(options[0], lora="--lora" in options, learning_rate=1e-5 if "--lora" in options else 1e-6)
