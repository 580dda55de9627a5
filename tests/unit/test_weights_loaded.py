"""Weights that do not fit their config are an error, prefixes of wrappers are read over, and random ones are called so.

One function loads weights, and every way to one is tried here: a folder, a GGUF file, `autorev.load`, a run that goes
on, adapters, and the commands.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import nn

import autorev
from autorev.cli import main
from autorev.errors import ModelBuildError
from autorev.models import weights
from autorev.models.load import load_model
from autorev.models.weights import check_adapters, load_weights, take_up_weights
from autorev.report.finetuning.verdict import verdict
from autorev.report.render import render_markdown, render_text
from tests.helpers import finetune_examples, profile_examples, zoo
from tests.helpers.tiny_llm import tiny_llm, tiny_model
from tests.helpers.tiny_run import At, interrupt, tune, workplace

pytestmark = pytest.mark.usefixtures("one_thread")

Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_said", set())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of two blocks as `save_pretrained` leaves it, with a tokenizer."""
    return tiny_llm(tmp_path_factory.mktemp("whole") / "llm", blocks=2)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy, to be treated badly."""
    return Path(shutil.copytree(whole, tmp_path / "llm"))


def rewrite(folder: Path, change: Callable[[Tensors], Tensors], kind: str = "safetensors") -> Path:
    """Write the folder's weights anew, as `change` makes them: in one file, in one of torch, or in two shards."""
    file = folder / "model.safetensors"
    found = change(load_file(file))
    file.unlink()
    if kind == "safetensors":
        save_file(found, file, metadata={"format": "pt"})
    elif kind == "bin":
        torch.save(found, folder / "pytorch_model.bin")
    else:
        names = sorted(found)
        places = {name: f"model-{1 + 2 * n // len(names):05}-of-00002.safetensors" for n, name in enumerate(names)}
        for shard in set(places.values()):
            save_file({n: found[n] for n in names if places[n] == shard}, folder / shard, metadata={"format": "pt"})
        index = {"metadata": {"total_size": 0}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def renamed(how: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    """The same weights under other names."""
    return lambda found: {how(name): tensor for name, tensor in found.items()}


def configured(folder: Path, **values: Any) -> Path:
    """Change entries of its config."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def load(folder: Path) -> Any:
    """The model, as the command line has it."""
    return load_model(str(folder), torch.float32, 1, None).model


def same(model: nn.Module, other: nn.Module) -> bool:
    """Are all weights equal?"""
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What autorev logged."""
    return [record.getMessage() for record in caplog.records if record.name == "autorev"]


def refusal(folder: Path) -> str:
    """The text of the error."""
    with pytest.raises(ModelBuildError) as caught:
        load(folder)
    return str(caught.value)


WRAPPED: dict[str, tuple[Callable[[str], str], str]] = {
    "ddp": (lambda name: f"module.{name}", "module."),
    "compiled": (lambda name: f"_orig_mod.{name}", "_orig_mod."),
    "compiled in ddp": (lambda name: f"module._orig_mod.{name}", "module., _orig_mod."),
    "ddp, compiled": (lambda name: f"_orig_mod.module.{name}", "_orig_mod., module."),
    "ddp twice": (lambda name: f"module.module.{name}", "module."),
    "compiled inside": (lambda name: name.replace("model.", "model._orig_mod.", 1), "_orig_mod."),
    "ddp inside": (lambda name: name.replace("model.", "model.module.", 1), "module."),
    "compiled block": (lambda name: re.sub(r"(layers\.\d+)\.", r"\1._orig_mod.", name), "_orig_mod."),
    "fsdp": (
        lambda name: "_fsdp_wrapped_module." + re.sub(r"(layers\.\d+)\.", r"\1._fsdp_wrapped_module.", name),
        "_fsdp_wrapped_module.",
    ),
    "checkpointed": (
        lambda name: re.sub(r"(layers\.\d+)\.", r"\1._checkpoint_wrapped_module.", name),
        "_checkpoint_wrapped_module.",
    ),
}


class TestPrefixes:
    """What torch.compile, DDP, FSDP and checkpointing leave in the names is read over, and that is said."""

    @pytest.mark.parametrize("kind", ["safetensors", "bin", "shards"])
    @pytest.mark.parametrize("wrapper", WRAPPED)
    def test_are_left_out(
        self, folder: Path, whole: Path, wrapper: str, kind: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Every weight is the saved one, and the log names the prefixes, once."""
        how, prefixes = WRAPPED[wrapper]
        rewrite(folder, renamed(how), kind)
        with caplog.at_level(logging.WARNING, "autorev"):
            assert same(load(folder), load(whole)) and same(load(folder), load(whole))
        (text,) = said(caplog)
        assert text.endswith(f"their names are read without {prefixes}") and str(folder) in text

    def test_are_not_written_again(self, folder: Path, tmp_path: Path) -> None:
        """A saved copy has plain names, the folder's settings for generation, and loads in silence."""
        (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.3, "do_sample": True}))
        model = load(rewrite(folder, renamed(lambda name: f"module._orig_mod.{name}")))
        assert model.generation_config.temperature == 0.3 and model.config.name_or_path == str(folder)
        model.save_pretrained(tmp_path / "copy")
        assert set(load_file(tmp_path / "copy" / "model.safetensors")) == set(model.state_dict())

    def test_are_left_out_of_experts_that_are_fused(self, tmp_path: Path) -> None:
        """Where transformers itself gives the weights other names."""
        model = zoo.build("mixtral")
        model.save_pretrained(tmp_path)
        rewrite(tmp_path, renamed(lambda name: f"_orig_mod.{name}"))
        assert same(load_weights(type(model), tmp_path), model)

    @pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
    def test_a_module_of_that_name_keeps_it(self, folder: Path, prefix: str) -> None:
        """A model may have a part that is called `module`, wrapped or not."""
        model = _WithModule(hf.LlamaConfig.from_pretrained(folder))
        model.save_pretrained(folder)
        assert "module.weight" in load_file(folder / "model.safetensors")
        assert same(load_weights(_WithModule, folder), model)
        rewrite(folder, renamed(lambda name: prefix + name))
        assert same(load_weights(_WithModule, folder), model)

    def test_a_weight_that_is_there_twice_is_refused(self, folder: Path) -> None:
        """Which of the two is meant, nobody knows."""
        rewrite(folder, lambda found: {**found, "_orig_mod.lm_head.weight": found["lm_head.weight"] + 1})
        assert "holds lm_head.weight twice, with and without" in refusal(folder)

    def test_what_is_missing_behind_them_is_still_missing(self, folder: Path) -> None:
        """A prefix is no excuse."""
        rewrite(folder, lambda found: {f"_orig_mod.{n}": t for n, t in found.items() if n != "model.norm.weight"})
        assert "1 of 21 are missing (model.norm.weight)" in refusal(folder)


class _WithModule(hf.LlamaForCausalLM):  # type: ignore[misc]  # transformers is untyped
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.module = nn.Linear(3, 2, bias=False)
        self.post_init()


class TestMisfits:
    """Missing, left over, of another shape: each is an error that names the first ones, and how many they are."""

    def test_missing(self, folder: Path) -> None:
        """The first three in order, and their number."""
        rewrite(folder, lambda found: {name: t for name, t in found.items() if "mlp" not in name})
        text = refusal(folder)
        assert text.startswith(f"the weights in {folder} are not those of the LlamaForCausalLM that its config")
        names = ", ".join(f"model.layers.0.mlp.{part}_proj.weight" for part in ("down", "gate", "up"))
        assert f"6 of 21 are missing ({names}, ... (6 in all))" in text
        assert "config.json that was saved with these weights" in text and "have no place" not in text

    def test_left_over(self, folder: Path) -> None:
        """A bias that the config switches off would have been added."""
        rewrite(folder, lambda found: {**found, "model.layers.1.self_attn.q_proj.bias": torch.ones(32)})
        assert "1 have no place in the model (model.layers.1.self_attn.q_proj.bias)" in refusal(folder)

    @pytest.mark.parametrize(
        "name", ["model.layers.0.self_attn.q_norm.weight", "model.embed_positions.weight", "lm_head.bias", "scale"]
    )
    def test_left_over_in_the_body_is_no_head(self, folder: Path, name: str) -> None:
        """What a block, the base model or a module that is there would have computed with is not left out."""
        rewrite(folder, lambda found: {**found, name: torch.ones(32)})
        assert f"1 have no place in the model ({name})" in refusal(folder)

    def test_a_bias_is_no_mask_of_former_times(self, folder: Path) -> None:
        """Though its module is called as those that had masks."""
        model = tiny_model(blocks=2)
        model.lm_head.attention = nn.Linear(3, 3, bias=False)
        with pytest.raises(ModelBuildError, match=r"lm_head\.attention\.bias"):
            weights._check(
                folder,
                model,
                {"missing_keys": set(), "unexpected_keys": {"lm_head.attention.bias"}, "mismatched_keys": set()},
                False,
                None,
            )

    def test_one_block_more_outside_the_base_model_is_no_head(self, folder: Path) -> None:
        """A list that goes on would have been computed, too."""
        _WithTail(hf.LlamaConfig.from_pretrained(folder)).save_pretrained(folder)
        rewrite(folder, lambda found: {**found, "tail.1.weight": torch.ones(2, 3)})
        with pytest.raises(ModelBuildError, match=r"no place in the model \(tail\.1\.weight\), among them all of"):
            load_weights(_WithTail, folder)

    def test_of_another_shape(self, folder: Path) -> None:
        """Both shapes are named."""
        rewrite(folder, lambda found: {**found, "lm_head.weight": torch.zeros(300, 32)})
        assert "1 have another shape (lm_head.weight is [300, 32], not [259, 32])" in refusal(folder)

    def test_all_of_another_shape(self, folder: Path) -> None:
        """A config of another width."""
        text = refusal(configured(folder, intermediate_size=64, num_key_value_heads=4))
        assert "10 have another shape (model.layers.0.mlp.down_proj.weight is [32, 48], not [32, 64]" in text
        assert "(10 in all)" in text

    def test_names_of_another_model(self, folder: Path) -> None:
        """Nothing fits: both sides are named."""
        text = refusal(rewrite(folder, renamed(lambda name: f"transformer.{name}")))
        assert "21 of 21 are missing" in text and "21 have no place in the model" in text

    @pytest.mark.parametrize(("layers", "words"), [(4, "18 of 39 are missing"), (1, "9 have no place in the model")])
    def test_more_or_fewer_blocks_than_the_config(self, folder: Path, layers: int, words: str) -> None:
        """The blocks are named, on which side ever they are."""
        text = refusal(configured(folder, num_hidden_layers=layers))
        assert words in text and "among them all of model.layers." + {4: "2, model.layers.3", 1: "1"}[layers] in text

    def test_a_head_that_is_not_tied(self, folder: Path) -> None:
        """Without it, the tokens would be drawn."""
        rewrite(folder, lambda found: {name: t for name, t in found.items() if name != "lm_head.weight"})
        assert "1 of 21 are missing (lm_head.weight)" in refusal(folder)

    def test_an_expert(self, tmp_path: Path) -> None:
        """What transformers cannot fuse is named, though its exception points to a log."""
        model = zoo.build("mixtral")
        model.save_pretrained(tmp_path)
        gone = next(name for name in load_file(tmp_path / "model.safetensors") if "experts.3.w1" in name)
        rewrite(tmp_path, lambda found: {name: tensor for name, tensor in found.items() if name != gone})
        with pytest.raises(ModelBuildError, match=r"(cannot be converted|have another shape) \(model\.layers\.\d"):
            load_weights(type(model), tmp_path)

    @pytest.mark.parametrize("gone", [1, 2])
    def test_a_shard(self, folder: Path, gone: int) -> None:
        """The index names it; without any shard the folder is still one with weights."""
        rewrite(folder, lambda found: found, "shards")
        for number in (1, 2)[:gone]:
            (folder / f"model-0000{number}-of-00002.safetensors").unlink()
        text = refusal(folder)
        assert f"lacks {gone} of the 2 files of weights that its model.safetensors.index.json names" in text
        assert "model-00001-of-00002.safetensors" in text and "download or copy" in text

    def test_a_shard_of_less_than_its_index_says(self, folder: Path) -> None:
        """The index alone is no weight."""
        rewrite(folder, lambda found: found, "shards")
        shard = folder / "model-00001-of-00002.safetensors"
        save_file(dict(list(load_file(shard).items())[1:]), shard, metadata={"format": "pt"})
        assert "1 of 21 are missing" in refusal(folder)

    @pytest.mark.parametrize(("index", "words"), [(None, "no index that says"), ("[1, 2", "is no index of weights")])
    def test_an_index(self, folder: Path, index: str | None, words: str) -> None:
        """Shards without one, or with a broken one."""
        rewrite(folder, lambda found: found, "shards")
        path = folder / "model.safetensors.index.json"
        if index is None:
            path.unlink()
        else:
            path.write_text(index)
        assert words in refusal(folder)


class TestLegitimate:
    """What may be absent, or left over, still may."""

    def test_a_tied_head(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """It is the embedding."""
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**zoo.HEADS, tie_word_embeddings=True))
        model.save_pretrained(tmp_path)
        assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
        found = load(tmp_path)
        assert same(found, model) and found.lm_head.weight is found.model.embed_tokens.weight
        assert not said(caplog)

    def test_what_a_class_says_may_be_missing(self, folder: Path) -> None:
        """`_keys_to_ignore_on_load_missing`."""
        assert load_weights(_WithOptional, folder).module.weight.shape == (2, 3)
        with pytest.raises(ModelBuildError, match=r"1 of 22 are missing \(module\.weight\)"):
            load_weights(_WithModule, folder)

    @pytest.mark.parametrize(
        "name", ["model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq", "model.position_ids"]
    )
    def test_buffers_of_former_times(
        self, folder: Path, whole: Path, name: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The model computes them."""
        rewrite(folder, lambda found: {**found, name: torch.ones(4)})
        assert same(load(folder), load(whole)) and not said(caplog)

    def test_a_buffer_that_the_model_makes_itself(self, folder: Path) -> None:
        """It is not among the saved ones, and one that was saved once is not wanted."""
        model = _WithTail(hf.LlamaConfig.from_pretrained(folder))
        model.save_pretrained(folder)
        rewrite(folder, lambda found: {**found, "table": torch.ones(3)})
        assert "table" not in model.state_dict() and same(load_weights(_WithTail, folder), model)

    def test_what_a_class_says_may_be_left_over(self, tmp_path: Path) -> None:
        """`_keys_to_ignore_on_load_unexpected`: GPT-2's causal masks."""
        model = tiny_model("gpt2")
        model.save_pretrained(tmp_path)
        extra = {"transformer.h.0.attn.bias": torch.ones(1), "transformer.h.0.attn.masked_bias": torch.ones(())}
        rewrite(tmp_path, lambda found: {**found, **extra})
        assert same(load(tmp_path), model)

    def test_counters_of_batch_norms(self, tmp_path: Path) -> None:
        """Files older than they are lack them."""
        model = zoo.build("resnet-basic")
        model.save_pretrained(tmp_path)
        rewrite(tmp_path, lambda found: {n: t for n, t in found.items() if not n.endswith("num_batches_tracked")})
        found = load_weights(type(model), tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), found.parameters(), strict=True))

    def test_heads_that_the_class_lacks(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """BERT as it is published has two more than the masked language model: they are left out, and that is said."""
        config = hf.BertConfig(**{k: v for k, v in zoo.SIZES.items() if k != "num_key_value_heads"})
        trained = hf.BertForPreTraining(config)
        trained.save_pretrained(tmp_path)
        configured(tmp_path, architectures=["BertForMaskedLM"])
        with caplog.at_level(logging.WARNING, "autorev"):
            model = load(tmp_path)
            load(tmp_path)
        assert type(model) is hf.BertForMaskedLM
        assert torch.equal(model.bert.embeddings.word_embeddings.weight, trained.bert.embeddings.word_embeddings.weight)
        (text,) = said(caplog)
        assert "BertForMaskedLM has no such head, and leaves 4 of the weights" in text and "bert.pooler.dense" in text

    def test_a_body_without_the_head_of_its_class(self, tmp_path: Path) -> None:
        """Nothing is made up for it."""
        config = hf.BertConfig(**{k: v for k, v in zoo.SIZES.items() if k != "num_key_value_heads"})
        hf.BertModel(config).save_pretrained(tmp_path)
        assert type(load(tmp_path)) is hf.BertModel
        assert "are missing (cls.predictions." in refusal(configured(tmp_path, architectures=["BertForMaskedLM"]))

    @pytest.mark.parametrize("family", ["gpt2", "t5", "roberta", "mixtral", "swin", "clip", "opt-pre", "mamba"])
    def test_what_save_pretrained_wrote(self, tmp_path: Path, family: str, caplog: pytest.LogCaptureFixture) -> None:
        """Nothing is amiss with a model that was just saved."""
        model = zoo.build(family)
        model.save_pretrained(tmp_path)
        assert same(load_weights(type(model), tmp_path), model) and not said(caplog)


class _WithTail(hf.LlamaForCausalLM):  # type: ignore[misc]  # transformers is untyped
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.tail = nn.ModuleList([nn.Linear(3, 2, bias=False)])
        self.register_buffer("table", torch.zeros(3), persistent=False)
        self.post_init()


class _WithOptional(_WithModule):
    _keys_to_ignore_on_load_missing = (r"^module\.",)


# -- every other way to weights


def gguf_of(model: Any, path: Path, leave_out: str = "") -> Path:
    """A Llama as a GGUF file, with its tensors by llama.cpp's names but for one."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        theirs = names.get_name(name, try_suffixes=(".weight",))
        if theirs != leave_out:
            writer.add_tensor(theirs, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class TestGguf:
    """A GGUF file is loaded by the same function."""

    def test_a_whole_one(self, tmp_path: Path) -> None:
        """Every weight of it."""
        model = tiny_model(blocks=2)
        found = load(gguf_of(model, tmp_path / "tiny.gguf"))
        assert torch.equal(found.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)
        assert torch.equal(found.lm_head.weight, model.lm_head.weight)

    @pytest.mark.parametrize("gone", ["blk.1.ffn_up.weight", "blk.0.attn_q.weight", "output_norm.weight"])
    def test_one_that_lacks_a_tensor(self, tmp_path: Path, gone: str) -> None:
        """It is named as the model has it, and the file too."""
        text = refusal(gguf_of(tiny_model(blocks=2), tmp_path / "tiny.gguf", leave_out=gone))
        assert "1 of 21 are missing (model." in text and "tiny.gguf are not those of the LlamaForCausalLM" in text
        assert text.endswith("Convert or download the file once more")


class TestConverted:
    """`autorev.load`, of a converted model."""

    @pytest.fixture
    def converted(self, folder: Path) -> Path:
        """Saved converted."""
        model = hf.LlamaForCausalLM.from_pretrained(folder)
        autorev.convert(model, batch=(torch.arange(8)[None],))
        model.save_pretrained(folder)
        return folder

    def test_with_missing_weights(self, converted: Path) -> None:
        """It is refused."""
        rewrite(converted, lambda found: {name: t for name, t in found.items() if "layers.1.mlp" not in name})
        with pytest.raises(ModelBuildError, match=r"3 of 21 are missing \(model\.layers\.1\.mlp\.down_proj\.weight"):
            autorev.load(converted)

    def test_saved_from_ddp(self, converted: Path, whole: Path, caplog: pytest.LogCaptureFixture) -> None:
        """The prefix is read over, and it is converted all the same."""
        rewrite(converted, renamed(lambda name: f"module.{name}"))
        with caplog.at_level(logging.WARNING, "autorev"):
            model = autorev.load(converted)
        assert same(model, load(whole)) and any("read without module." in text for text in said(caplog))

    def test_another_shape_that_was_asked_for(self, converted: Path) -> None:
        """`ignore_mismatched_sizes` of `from_pretrained` means what it meant."""
        rewrite(converted, lambda found: {**found, "lm_head.weight": torch.zeros(300, 32)})
        with pytest.raises(ModelBuildError, match=r"lm_head.weight is \[300, 32\], not \[259, 32\]"):
            autorev.load(converted)
        model: Any = autorev.load(converted, ignore_mismatched_sizes=True)
        assert model.lm_head.weight.shape == (259, 32)


class TestGoingOn:
    """Weights that are put back into a model."""

    def test_experts_are_taken_up(self, tmp_path: Path) -> None:
        """They are saved one by one, and computed as one tensor: the Trainer would leave those of the start."""
        model = zoo.build("mixtral")
        model.save_pretrained(tmp_path)
        saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        take_up_weights(model, tmp_path)
        assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())

    @pytest.mark.parametrize("how", [{}, {"lora_rank": 2}], ids=["all weights", "adapters"])
    def test_a_checkpoint_of_other_weights(self, tmp_path: Path, how: dict[str, Any]) -> None:
        """A run does not go on with the weights of its start, as the Trainer does with a warning."""
        place = workplace(tmp_path)
        with pytest.raises(autorev.errors.TrainingError):
            tune(place, callbacks=(At(2, interrupt, "on_step_begin"),), **how)
        (checkpoint,) = (place / "run").glob("checkpoint-3")
        file = checkpoint / ("adapter_model.safetensors" if how else "model.safetensors")
        size = file.stat().st_size
        found = load_file(file)
        save_file({name.replace("layers.1.", "layers.7."): t for name, t in found.items()}, file, {"format": "pt"})
        assert file.stat().st_size == size, "else it counts as cut short"
        with pytest.raises(autorev.errors.DamagedError, match="is not what was written"):
            tune(place, resume=True, **how)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda found: dict(list(found.items())[1:]), "1 of 4 are missing"),
            (lambda found: {**found, "base_model.model.other.lora_A.weight": torch.ones(2)}, "1 belong to no module"),
            (lambda found: {name: tensor[:1] for name, tensor in found.items()}, "4 have another shape"),
        ],
    )
    def test_adapters(self, tmp_path: Path, change: Callable[[Tensors], Tensors], words: str) -> None:
        """Missing, left over, or of another shape."""
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(tiny_model(blocks=2), peft.LoraConfig(r=2, target_modules=["q_proj"]))
        model.save_pretrained(tmp_path)
        check_adapters(model, tmp_path)
        file = tmp_path / "adapter_model.safetensors"
        save_file({name: t.contiguous() for name, t in change(load_file(file)).items()}, file)
        with pytest.raises(ModelBuildError, match=words):
            check_adapters(model, tmp_path)


# -- the commands


def run(*arguments: str) -> Result:
    """A command, in this process."""
    return CliRunner().invoke(main, list(arguments))


class TestCommands:
    """What the user sees."""

    @pytest.fixture(autouse=True)
    def _elsewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)  # records and reports go to the folder that one stands in

    @pytest.mark.parametrize("command", ["verify", "evaluate", "finetune", "profile", "export"])
    def test_a_misfit_is_an_error_without_a_traceback(self, folder: Path, tmp_path: Path, command: str) -> None:
        """Exit code 1, and one message; nothing is measured or trained before."""
        configured(folder, num_hidden_layers=3, **({"autorev": {}} if command == "export" else {}))
        options = {"finetune": ["--out", str(tmp_path / "run")], "export": ["--out", str(tmp_path / "plain")]}
        done = run(command, str(folder), *options.get(command, []))
        assert done.exit_code == 1
        assert f"Error: the weights in {folder} are not those of the LlamaForCausalLM" in done.output
        assert "9 of 30 are missing (model.layers.2." in done.output and "Traceback" not in done.output
        assert not (tmp_path / "run" / "run.json").exists()

    def test_predictions_need_no_weights(self, folder: Path) -> None:
        """They are those of the config."""
        done = run("profile", str(configured(folder, num_hidden_layers=3)), "--predict")
        assert done.exit_code == 0, done.output

    @pytest.mark.parametrize("original", [False, True])
    def test_evaluate_calls_random_weights_so(self, folder: Path, tmp_path: Path, original: bool) -> None:
        """Of the model, and of what it is compared with."""
        bare = tiny_llm(tmp_path / "bare", weights=False, blocks=2)
        given = [str(folder), "--original", str(bare)] if original else [str(bare)]
        done = run("evaluate", *given)
        assert done.exit_code == 0, done.output
        assert ("(random weights): the same" if original else f"{bare}, random weights, on ") in done.output
        found = json.loads(run("evaluate", *given, "--json").stdout)
        assert (found["pretrained"], found["original_pretrained"]) == (original, not original)

    def test_weights_in_files_that_nobody_reads(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        """A config beside a file of torch: random weights, which is said."""
        (folder / "model.safetensors").rename(folder / "model.pth")
        with caplog.at_level(logging.WARNING, "autorev"):
            assert not load_model(str(folder), torch.float32, 1, None).pretrained
        (text,) = said(caplog)
        assert text.startswith(f"the weights are random: {folder} has model.pth, which is not read")


class TestRandom:
    """What came of random weights is not recommended."""

    @pytest.mark.parametrize("coupling", ["leapfrog", "momentum:k=3", "plain"])
    @pytest.mark.parametrize("vanilla", [True, False])
    def test_is_not_to_be_shipped(self, coupling: str, vanilla: bool) -> None:
        """In no form, however good it is there."""
        record = finetune_examples.scratch(coupling)
        record = replace(record, vanilla=record.final if vanilla else None)
        found = verdict(record)
        assert found.title == "Trained from random weights"
        assert "It began from random weights" in found.text and "do not ship it before" in found.text
        assert not re.search(r"[Ss]hip it (as|rev|with)|ship it with|autorev export", f"{found.title} {found.text}")

    def test_the_same_run_of_a_trained_model_is(self) -> None:
        """So it is the weights that the verdict looks at."""
        assert verdict(replace(finetune_examples.momentum(), pretrained=False)).title == "Trained from random weights"
        assert verdict(finetune_examples.momentum()).title == "Ship it as the plain architecture"

    def test_a_report_does_not_call_it_the_original(self) -> None:
        """In the terminal and as Markdown."""
        text = render_text(finetune_examples.scratch("leapfrog"))
        assert "random weights" in text.splitlines()[0] and not re.search(r"^original", text, re.MULTILINE)
        assert "original" in render_text(finetune_examples.momentum())
        assert "from scratch" in render_markdown([finetune_examples.scratch("leapfrog")])

    def test_a_profile_says_so(self) -> None:
        """In its first line; of a model with weights it says nothing."""
        assert "24 blocks, random weights" in " ".join(render_text(profile_examples.deep(24)).split())
        assert "random weights" not in render_text(profile_examples.smollm2())
