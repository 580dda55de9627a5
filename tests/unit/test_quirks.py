"""Under fake tensors a `transformers` model keeps for backward what it keeps in real training."""

import subprocess
import sys
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from autorev.capture.fake import new_fake_mode
from autorev.integrations.quirks import quirks

pytest.importorskip("transformers")

COMMON = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
COMMON |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
EXPERTS = COMMON | {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
EXPERTS |= {"moe_intermediate_size": 24}
LATENT = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16}
LATENT |= {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
MODELS: dict[str, dict[str, Any]] = {
    "llama": COMMON,
    "gemma2": COMMON,
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS,
    "deepseek_v3": EXPERTS | LATENT | {"num_key_value_heads": 4, "head_dim": 8},
}


def kept_bytes(family: str, dtype: torch.dtype, fake: bool) -> int:
    """Bytes that autograd keeps between forward and backward, parameters and buffers aside."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **MODELS[family])
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with ExitStack() as stack:
        if fake:
            stack.enter_context(new_fake_mode())
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
        if fake:
            stack.enter_context(quirks())
        own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        ids = torch.ones(1, 64, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return sum(storage.nbytes() for cdata, storage in kept.items() if cdata not in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", MODELS)
def test_fake_and_real_training_keep_the_same_bytes(family: str, dtype: torch.dtype) -> None:
    """No mask is made up and no expert copied: the two agree to the few bytes of the experts' offsets."""
    assert kept_bytes(family, dtype, fake=True) == pytest.approx(kept_bytes(family, dtype, fake=False), abs=64)


def test_what_was_patched_is_put_back() -> None:
    """Even when the model fails, transformers is afterwards what it was."""
    from transformers import masking_utils

    original = masking_utils.find_packed_sequence_indices
    with pytest.raises(RuntimeError, match="forward"), quirks():
        assert masking_utils.find_packed_sequence_indices is not original
        raise RuntimeError("forward")
    assert masking_utils.find_packed_sequence_indices is original


def test_quirks_does_not_import_transformers() -> None:
    """For a user's own model nothing is patched, and transformers is not loaded for it."""
    code = (
        "import sys\n"
        "from autorev.integrations.quirks import quirks\n"
        "with quirks(): pass\n"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
