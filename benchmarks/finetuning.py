"""The recorded fine-tunings: python -m benchmarks.finetuning [GROUP...]

Each run is one `autorev finetune` in a process of its own; its record goes to profiles/recorded/finetuning, its weights
are dropped. What is recorded already is not run again.

    quality     plain, checkpointed and reversible (k = 3 and 2): same data, order and seed
    couplings   every other coupling by the same recipe, and side bits calibrated under a budget
    schedule    moving gamma to 1 while training, with and without distillation, against the direct jump
    scratch     a GPT-2-shaped model from random weights, every architecture, two seeds
    quantised   LoRA on weights in nf4 (QLoRA), beside bf16 autocast and float32
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from autorev.finetuning.record import FILE, FineTuning
from benchmarks.workloads import TEXT

RECORDS = Path("profiles/recorded/finetuning")
QUALITY = "--sequence 192 --steps 30 --lr 5e-5 --evaluate-every 10 --save-every 1000"
SCHEDULE = "--sequence 192 --steps 80 --lr 1e-4 --evaluate-every 20 --save-every 1000"
SCRATCH = "--sequence 128 --batch 8 --steps 300 --lr 1e-3 --decay cosine --evaluate-every 50 --save-every 1000"
QUANTISED = "--lora-rank 16 --sequence 128 --steps 12 --evaluate-every 12 --save-every 1000 --validation-rows 8"
ARCHITECTURES = ("plain", "leapfrog", "midpoint", "midpoint_a", "hamiltonian")
COUPLINGS = ("momentum:k=4", "momentum:k=1", "leapfrog", "midpoint", "bdia", "hamiltonian", "revnet")

GROUPS: dict[str, dict[str, str]] = {
    "quality": {
        "plain": f"--method plain {QUALITY}",
        "checkpoint": f"--method checkpoint {QUALITY}",
        "momentum_k3": f"--method momentum:k=3 {QUALITY}",
        "momentum_k2": f"--method momentum:k=2 {QUALITY}",
        "lora_plain": f"--method plain --lora-rank 16 {QUALITY}",
        "lora_checkpoint": f"--method checkpoint --lora-rank 16 {QUALITY}",
        "lora_momentum_k3": f"--method momentum:k=3 --lora-rank 16 {QUALITY}",
    },
    "couplings": {
        "calibrated": f"--max-loss-increase 0.02 {QUALITY}",
        **{spec.replace(":k=", "_k"): f"--method {spec} {QUALITY}" for spec in COUPLINGS},
        # Its activations reach 150,000, and the grid that is chosen would have no room for 16 times that.
        "midpoint_a": f"--method midpoint_a:fraction_bits=8 {QUALITY}",
    },
    "schedule": {
        "schedule_distilled": f"--schedule leapfrog --distill {SCHEDULE}",
        "jump_distilled": f"--method leapfrog --distill {SCHEDULE}",
        "schedule": f"--schedule leapfrog {SCHEDULE}",
        "jump": f"--method leapfrog {SCHEDULE}",
    },
    "scratch": {
        f"scratch_{coupling}_{seed}": f"SCRATCH --method {coupling} --seed {seed} {SCRATCH}"
        for seed in (0, 1)
        for coupling in ARCHITECTURES
    },
    "quantised": {
        "qlora_nf4": f"--method momentum:k=3 --quantize nf4 {QUANTISED}",
        "qlora_nf4_checkpoint": f"--method checkpoint --quantize nf4 {QUANTISED}",
        "qlora_bf16": f"--method momentum:k=3 --autocast bf16 {QUANTISED}",
        "qlora_fp32": f"--method momentum:k=3 {QUANTISED}",
    },
}


def main() -> None:
    """Run what is not recorded yet."""
    wanted = sys.argv[1:] or list(GROUPS)
    RECORDS.mkdir(parents=True, exist_ok=True)
    for group in wanted:
        for name, arguments in GROUPS[group].items():
            record = RECORDS / f"{name}.json"
            if not record.exists():
                run(Path("runs") / name, arguments, record)


def run(out: Path, arguments: str, record: Path) -> None:
    """One fine-tuning, of which the record is kept."""
    words = arguments.split()
    if words[0] == "SCRATCH":
        words[0] = str(gpt2_shape(Path("runs/gpt2-shape")))
    command = [sys.executable, "cli.py", "finetune", *words, "--out", str(out)]
    print(" ".join(command[1:]), flush=True)
    subprocess.run(command, check=False)
    if (out / FILE).is_file() and FineTuning.read(out / FILE).complete:
        shutil.copy(out / FILE, record)
    shutil.rmtree(out, ignore_errors=True)


def gpt2_shape(folder: Path, blocks: int = 8, width: int = 128, words: int = 2048) -> Path:
    """A config of GPT-2's shape, and a byte-pair tokenizer of the text that it will read."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, PreTrainedTokenizerFast

    if (folder / "config.json").is_file():
        return folder
    pairs = ByteLevelBPETokenizer()
    pairs.train_from_iterator([TEXT], vocab_size=words, special_tokens=["<|end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pairs._tokenizer, eos_token="<|end|>")
    tokenizer.save_pretrained(folder)
    config = GPT2Config(
        n_embd=width,
        n_layer=blocks,
        n_head=width // 32,
        n_positions=256,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    config.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
