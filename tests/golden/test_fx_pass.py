"""AnnotateResiduals on graphs that people made themselves: what it writes, and what it leaves alone."""

import copy
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.infra.pass_manager import PassManager
from torch.fx.passes.shape_prop import ShapeProp

from autorev.analysis import Verdict
from autorev.errors import CaptureError
from autorev.fx.annotate import AnnotateResiduals, Role

LINES = Path(__file__).read_text().splitlines()
WIDTH = 8
IDS = torch.zeros(2, 6, dtype=torch.long)
HIDDEN = torch.zeros(2, 6, WIDTH)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.shape
        heads = self.qkv(x).view(b, t, 2, 3 * (c // 2)).transpose(1, 2).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(*(heads[i] for i in range(3))).transpose(1, 2).reshape(b, t, c))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u = self.up(x)
        return self.down(0.5 * u * (1 + torch.tanh(0.79788 * (u + 0.044715 * u**3))))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = (
            nn.LayerNorm(WIDTH),
            Attention(),
            nn.LayerNorm(WIDTH),
            MLP(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class PostNorm(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.ln_1(x + self.attn(x))
        return self.ln_2(x + self.mlp(x))


class Halved(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x + self.mlp(x)


class Scaled(Block):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gain * x + self.mlp(x)


class GPT(nn.Module):
    """nanoGPT in small."""

    def __init__(self, block: type[nn.Module] = Block) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(10, WIDTH), nn.Embedding(10, WIDTH)
        self.h = nn.ModuleList([block(), block()])
        self.ln_f, self.lm_head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.size(1)))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class Tracer(fx.Tracer):
    """Somebody's own: keeps modules of the given classes closed, and the lines of the user's code."""

    record_stack_traces = True

    def __init__(self, *closed: type[nn.Module]) -> None:
        super().__init__()
        self.closed = closed

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self.closed) or super().is_leaf_module(m, module_qualified_name)


def traced(model: nn.Module, *closed: type[nn.Module]) -> fx.GraphModule:
    return fx.GraphModule(model, Tracer(*closed).trace(model))


def exported(model: nn.Module, *args: Any) -> fx.GraphModule:
    return torch.export.export(model, args).module()


BOTH_WAYS = pytest.mark.parametrize(
    "graph_of", [traced, lambda model: exported(model, IDS)], ids=["traced", "exported"]
)


def traced_function(function: Callable[..., Any]) -> fx.GraphModule:
    """A graph around one MLP, without lines of source."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mlp, self.drop = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(self, x)

    return fx.symbolic_trace(Model())


def listing(gm: fx.GraphModule) -> str:
    """Chains and annotated nodes, branches left out; a line of this file is shown by its text."""
    lines = [f"{chain.name}: {chain.steps} steps, {chain.verdict.value}" for chain in gm.meta["autorev"]]
    for node in gm.graph.nodes:
        found = node.meta.get("autorev")
        if found is None or found.role is Role.BRANCH:
            continue
        file, _, number = found.source.rpartition(":")
        where = LINES[int(number) - 1].strip() if file.endswith("test_fx_pass.py") else found.source
        place = "" if found.chain is None else f" {found.chain}.{found.step}"
        reason = found.reason.partition(":")[0]
        lines.append(f"{node.name} {found.role.value}{place} | {where}" + (f" | {reason}" if reason else ""))
    return "\n".join(lines)


def expected(text: str) -> str:
    return dedent(text).strip()


# -- what is written


def test_nanogpt_with_its_children_as_leaves() -> None:
    """Attention and MLP closed: the four sums of two blocks are the cuts of one chain."""
    gm = traced(GPT(), Attention, MLP)
    AnnotateResiduals((IDS,))(gm)
    assert listing(gm) == expected(
        """
        h: 4 steps, eligible
        add stream 0.0 | x = self.wte(ids) + self.wpe(torch.arange(ids.size(1)))
        add_1 cut 0.0 | x = x + self.attn(self.ln_1(x))
        add_2 cut 0.1 | return x + self.mlp(self.ln_2(x))
        add_3 cut 0.2 | x = x + self.attn(self.ln_1(x))
        add_4 cut 0.3 | return x + self.mlp(self.ln_2(x))
        """
    )


def test_nanogpt_expanded() -> None:
    """Opened down to torch's own layers: the GELU's inner add is part of a branch, and no step."""
    gm = fx.symbolic_trace(GPT())
    AnnotateResiduals((IDS,))(gm)
    assert listing(gm) == expected(
        """
        h: 4 steps, eligible
        add stream 0.0 | node add
        add_1 cut 0.0 | h.0 (Block)
        add_4 cut 0.1 | h.0 (Block)
        add_5 cut 0.2 | h.1 (Block)
        add_8 cut 0.3 | h.1 (Block)
        """
    )
    roles = {node.name: node.meta.get("autorev") for node in gm.graph.nodes}
    assert roles["add_2"].role is Role.BRANCH and roles["add_2"].step == 1
    assert roles["wte"] is None and roles["lm_head"] is None and roles["ids"] is None


def test_nanogpt_with_whole_blocks_as_leaves() -> None:
    """A closed block is looked into, and annotated with the last step that it holds."""
    gm = traced(GPT(), Block)
    AnnotateResiduals((IDS,))(gm)
    assert listing(gm) == expected(
        """
        h: 4 steps, eligible
        add stream 0.0 | x = self.wte(ids) + self.wpe(torch.arange(ids.size(1)))
        h_0 cut 0.1 | return x + self.mlp(self.ln_2(x))
        h_1 cut 0.3 | return x + self.mlp(self.ln_2(x))
        """
    )


def test_export_of_a_pre_norm_encoder() -> None:
    """Aten operators are read like torch's functions, and the shapes that export wrote are enough."""
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    gm = exported(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), HIDDEN)
    AnnotateResiduals()(gm)
    (chain,) = gm.meta["autorev"]
    assert (chain.name, chain.steps, chain.verdict, chain.reasons) == ("layers", 4, Verdict.ELIGIBLE, ())
    assert all(source.startswith("torch/nn/modules/transformer.py:") for source in chain.sources)


def test_export_of_nanogpt() -> None:
    """The cuts of an exported graph name the user's lines, not those inside torch."""
    gm = exported(GPT(), IDS)
    AnnotateResiduals()(gm)
    assert listing(gm) == expected(
        """
        h: 4 steps, eligible
        add stream 0.0 | x = self.wte(ids) + self.wpe(torch.arange(ids.size(1)))
        add_1 cut 0.0 | x = x + self.attn(self.ln_1(x))
        add_4 cut 0.1 | return x + self.mlp(self.ln_2(x))
        add_5 cut 0.2 | x = x + self.attn(self.ln_1(x))
        add_8 cut 0.3 | return x + self.mlp(self.ln_2(x))
        """
    )


def test_export_with_a_free_batch_size() -> None:
    """Sizes that export left open take the value they were traced with."""
    gm = torch.export.export(GPT(), (IDS,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    AnnotateResiduals()(gm)
    assert [chain.steps for chain in gm.meta["autorev"]] == [4]


@BOTH_WAYS
def test_post_norm_sums_are_refused(graph_of: Callable[[nn.Module], fx.GraphModule]) -> None:
    """Every sum of a post-norm model is refused, with the line of the norm; the GELU's inner add is not."""
    gm = graph_of(GPT(PostNorm))
    AnnotateResiduals((IDS,))(gm)
    assert listing(gm) == expected(
        """
        add_1 refused | x = self.ln_1(x + self.attn(x)) | post-norm
        add_4 refused | return self.ln_2(x + self.mlp(x)) | post-norm
        add_5 refused | x = self.ln_1(x + self.attn(x)) | post-norm
        add_8 refused | return self.ln_2(x + self.mlp(x)) | post-norm
        """
    )


def test_refused_leaf_carries_the_reason() -> None:
    """A closed post-norm block is refused as a whole."""
    gm = traced(GPT(PostNorm), PostNorm)
    AnnotateResiduals((IDS,))(gm)
    assert [line.partition(" |")[0] for line in listing(gm).splitlines()] == ["h_0 refused", "h_1 refused"]


def test_scaled_sums_are_refused() -> None:
    """`a * x + f(x)` in a row is no chain where `a` is learned, and says why."""
    gm = traced(GPT(Scaled))
    AnnotateResiduals((IDS,))(gm)
    lines = listing(gm).splitlines()
    assert len(lines) == 2 and all(line.endswith("| scaled-shortcut") for line in lines)


def test_encoder_and_decoder_are_two_chains() -> None:
    """The encoder, which every branch of the decoder reads, belongs to none of them."""
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    options: Any = {"dropout": 0.0, "batch_first": True, "norm_first": True}
    model = nn.Transformer(WIDTH, 2, 3, 2, 16, custom_encoder=encoder, **options)
    gm = exported(model, HIDDEN, torch.zeros(2, 4, WIDTH))
    AnnotateResiduals()(gm)
    assert [(chain.name, chain.steps) for chain in gm.meta["autorev"]] == [
        ("encoder.layers", 6),
        ("decoder.layers", 6),
    ]


def test_plain_mlp_has_no_chain() -> None:
    """Nothing is annotated, not even the sum inside a hand-written GELU; the empty result is written down."""
    gm = fx.symbolic_trace(nn.Sequential(MLP(), MLP()))
    assert AnnotateResiduals((HIDDEN,))(gm).modified
    assert gm.meta["autorev"] == []
    assert all("autorev" not in node.meta for node in gm.graph.nodes)


def test_stream_overwritten_in_place_refuses_the_chain() -> None:
    """`x.mul_(2)` between two steps hides behind a good skip, and is found by what it changed."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mlp(self.norm(x))
        x.mul_(2)
        return x + self.mlp(self.norm(x))

    gm = traced_function(forward)
    AnnotateResiduals((HIDDEN,))(gm)
    (chain,) = gm.meta["autorev"]
    assert chain.verdict is Verdict.REFUSED
    assert chain.reasons[0].startswith("in-place: ")


def test_caveats_of_a_chain() -> None:
    """Batch statistics and a cast of the stream do not refuse a chain, and are told."""

    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.conv(self.norm(x.float())).double()

    gm = fx.symbolic_trace(nn.Sequential(Convolution(), Convolution()))
    AnnotateResiduals((torch.zeros(2, 4, 5, 5),))(gm)
    (chain,) = gm.meta["autorev"]
    assert chain.verdict is Verdict.CAVEAT
    assert {reason.partition(":")[0] for reason in chain.reasons} == {"buffer-write", "stream-cast"}


# -- the contract of a pass


def test_second_run_modifies_nothing() -> None:
    """Annotations that are there already are recognised, and stale ones are replaced."""
    gm = fx.symbolic_trace(GPT())
    annotate = AnnotateResiduals((IDS,))
    assert annotate(gm).modified
    assert not annotate(gm).modified
    next(iter(gm.graph.nodes)).meta["autorev"] = "stale"
    assert annotate(gm).modified
    assert not annotate(gm).modified


@BOTH_WAYS
def test_graph_weights_and_meta_stay(graph_of: Callable[[nn.Module], fx.GraphModule]) -> None:
    """Code, weights and the user's own meta are the same objects and values before and after."""
    gm = graph_of(GPT())
    code, meta = gm.code, [dict(node.meta) for node in gm.graph.nodes]
    weights = {name: (id(p), p._version, p.detach().clone()) for name, p in gm.named_parameters()}
    with torch.random.fork_rng():
        state = torch.get_rng_state()
        AnnotateResiduals((IDS,))(gm)
        assert torch.equal(torch.get_rng_state(), state)
    assert gm.code == code
    gm.recompile()
    assert gm.code == code
    for name, p in gm.named_parameters():
        before, version, value = weights[name]
        assert (id(p), p._version) == (before, version) and torch.equal(p, value)
    for node, before in zip(gm.graph.nodes, meta, strict=True):
        assert {key: value for key, value in node.meta.items() if key != "autorev"} == before


def test_annotations_survive_a_copy() -> None:
    """A deep copy of the graph module carries them on."""
    gm = fx.symbolic_trace(GPT())
    AnnotateResiduals((IDS,))(gm)
    twin = copy.deepcopy(gm)
    assert listing(twin) == listing(gm)
    assert not AnnotateResiduals((IDS,))(twin).modified


def test_runs_in_a_pass_manager() -> None:
    """A PassManager takes it among other passes, and stops when nothing changes any more."""
    gm = fx.symbolic_trace(GPT())
    seen = []
    manager = PassManager([AnnotateResiduals((IDS,))], steps=3, run_checks_after_each_pass=True)
    manager.add_checks(lambda module: seen.append(module))
    result = manager(gm)
    assert result.modified and result.graph_module.meta["autorev"][0].steps == 4
    assert len(seen) == 3  # before, after the first round, and after the second, which changed nothing


def test_shape_prop_supplies_the_shapes() -> None:
    """After ShapeProp no example inputs are needed."""
    gm = fx.symbolic_trace(GPT())
    ShapeProp(gm).propagate(IDS)
    AnnotateResiduals()(gm)
    assert [chain.steps for chain in gm.meta["autorev"]] == [4]


def test_unknown_shapes_are_an_error_with_a_remedy() -> None:
    """Without shapes and without example inputs `requires` names the input and says what to do."""
    with pytest.raises(CaptureError, match=r"input ids is not known; pass example inputs, .*ShapeProp"):
        AnnotateResiduals()(fx.symbolic_trace(GPT()))


def test_wrong_number_of_example_inputs() -> None:
    """One input too many is named as such."""
    with pytest.raises(CaptureError, match=r"takes 1 inputs \(ids\), and AnnotateResiduals was given 2"):
        AnnotateResiduals((IDS, IDS))(fx.symbolic_trace(GPT()))


def test_example_inputs_that_do_not_fit() -> None:
    """The node that raises is named."""
    with pytest.raises(CaptureError, match=r"^node norm \(norm \(LayerNorm\)\) failed on fake tensors with Runtime"):
        AnnotateResiduals((torch.zeros(2, 3),))(traced_function(lambda self, x: self.norm(x)))


def test_graph_that_reads_values() -> None:
    """A node that needs a tensor's data stops the pass, by name."""
    with pytest.raises(CaptureError, match=r"^node item looks at the values of its tensors"):
        AnnotateResiduals((HIDDEN,))(traced_function(lambda self, x: x * x.sum().item()))
