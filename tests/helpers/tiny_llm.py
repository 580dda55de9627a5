"""A folder with a tiny language model, its weights and a tokenizer of bytes: what `autorev finetune` is tested on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END, PAD, START = "<|end|>", "<|pad|>", "<|start|>"
CHAT = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
LENGTH = 128
"""Of the model's context, in tokens, which are bytes."""


def tokenizer_of_bytes(chat: bool = True) -> Any:
    """A token per byte, and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_only.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, eos_token=END, pad_token=PAD, additional_special_tokens=[START]
    )
    if chat:
        made.chat_template = CHAT
    return made


def tiny_model(family: str = "llama", blocks: int = 4, dropout: float = 0.0) -> Any:
    """A model of a few thousand parameters, the same each time."""
    torch.manual_seed(0)
    if family == "gpt2":
        config = GPT2Config(
            n_embd=32, n_layer=blocks, n_head=4, vocab_size=259, n_positions=LENGTH, eos_token_id=256, bos_token_id=256,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
        )  # fmt: skip
        return GPT2LMHeadModel(config)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=259,
        max_position_embeddings=LENGTH,
        eos_token_id=256,
        pad_token_id=257,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def tiny_llm(folder: Path, family: str = "llama", weights: bool = True, chat: bool = True, **how: Any) -> Path:
    """Save one to `folder`; without `weights`, its config and tokenizer alone."""
    model = tiny_model(family, **how)
    if weights:
        model.save_pretrained(folder)
    else:
        model.config.save_pretrained(folder)
    tokenizer_of_bytes(chat).save_pretrained(folder)
    return folder
