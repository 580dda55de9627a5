"""Models as people write them: residual blocks that can be reversed, and one of each kind that cannot.

A comment `# here: CODE` marks the line that the reason with this code has to name.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

WIDTH = 16


class Attention(nn.Module):
    """Causal attention with one head."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0])


class MLP(nn.Module):
    """Two linear maps around GPT-2's tanh-GELU, whose `u + 0.044715 u^3` is a residual add by shape."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u = self.up(x)
        return self.down(0.5 * u * (1 + torch.tanh(0.7978845608 * (u + 0.044715 * u**3))))


class Parts(nn.Module):
    """What all the blocks below are made of."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.mlp = Attention(width), MLP(width)


class Block(Parts):
    """The block of nanoGPT."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Stack(nn.Module):
    """Embedding, blocks, head: nanoGPT, with any block."""

    def __init__(self, *blocks: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 50)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def stack_of(block: type[nn.Module], depth: int = 3) -> Stack:
    """`depth` blocks of one class."""
    return Stack(*(block() for _ in range(depth)))


# -- eligible


class Parallel(Parts):
    """Attention and MLP beside each other: one step of two terms."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        return x + self.attention(h) + self.mlp(h)


class ScaledShortcut(Parts):
    """A factor on the skip."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.9 * x + self.mlp(self.norm1(x))


class ScaledByAlpha(Parts):
    """A factor on the skip, hidden in the add."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.add(self.mlp(self.norm1(x)), x, alpha=2)


class NegatedShortcut(Parts):
    """`f(x) - x`: the factor is -1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.norm1(x)) - x


class HalvedSum(Parts):
    """The sum itself is scaled."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.mlp(self.norm1(x))) * 0.5**0.5


class Interpolated(Parts):
    """`lerp` scales the skip."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.lerp(x, self.mlp(self.norm1(x)), 0.1)


class LayerScalar(Parts):
    """Gemma 4's: a buffer multiplies what leaves the block, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("layer_scalar", torch.full((1,), 0.8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        x *= self.layer_scalar
        return x


class WaveNet(nn.Module):
    """A loop that halves the variance of each sum, and collects something else on the way."""

    def __init__(self, depth: int = 6) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Parts() for _ in range(depth))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = 0
        for part in self.parts:
            both = part.mlp(part.norm1(x))
            x = (x + both) * 0.5**0.5
            total = total + both
        return self.head(x + total)


class Leaking(WaveNet):
    """A loop whose turns begin with the product."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = x * 0.9
            x = x + part.mlp(part.norm1(x))
            x = part.attention(part.norm2(x)) + x
        return self.head(2 * x)


class Injecting(nn.Module):
    """Every turn of the loop reads the stream that the loop began with, in its sum and in its branch."""

    def __init__(self, depth: int = 5) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.parts = nn.ModuleList(Parts() for _ in range(depth))
        self.gain = nn.Parameter(torch.tensor(0.1))

    def turn(self, part: Parts, h: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        h = h + self.gain * first
        return h + part.mlp(part.norm1(h + 0.2 * first))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = first = self.stem(x)
        for part in self.parts:
            h = h + self.gain * first
            h = h + part.mlp(part.norm1(h + 0.2 * first))
        return self.head(h)


class LongSkips(Stack):
    """The U-Net of modded-nanogpt: states wait in a list, and the second half of the loop adds them."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        self.gains = nn.Parameter(torch.full((len(blocks) // 2,), 0.3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, skips, half = self.embedding(tokens), [], len(self.blocks) // 2
        for number, block in enumerate(self.blocks):
            if number >= half:
                x = x + self.gains[number - half] * skips.pop()
            x = block(x)
            if number < half:
                skips.append(x)
        return self.head(self.norm(x))


class Rescaled(Parts):
    """ReZero, LayerScale and a gate: whatever multiplies the branch belongs to the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((), 0.1))
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.1))
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.alpha * self.attention(self.norm1(x))
        x = torch.addcmul(x, self.scale, self.mlp(self.norm2(x)))
        return torch.add(x, torch.sigmoid(self.gate(x)) * self.mlp(x), alpha=0.5)


class Subtracting(Parts):
    """`x - f(x)` is a step too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x - self.attention(self.norm1(x))
        return sum([x, self.mlp(self.norm2(x))])


class Dropping(Parts):
    """Dropout and stochastic depth on the branch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + F.dropout(self.attention(self.norm1(x)), 0.2, self.training)
        keep = torch.empty(x.shape[0], 1, 1, dtype=x.dtype)
        keep[:] = torch.rand(x.shape[0], 1, 1) < 0.8
        return x + self.mlp(self.norm2(x)) * keep / 0.8


class PreNormAttention(Parts):
    """Half a block, with a name that says norm and is none (RoBERTa-PreLayerNorm)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.attention(self.norm1(x))


class OfHalves(Parts):
    """The first add stands in a sub-module."""

    def __init__(self) -> None:
        super().__init__()
        self.first = PreNormAttention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return x + self.mlp(self.norm2(x))


class WithSideStream(Parts):
    """Carries a second stream beside its own, which the first step feeds."""

    def forward(self, x: torch.Tensor, side: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.attention(self.norm1(x))
        x = x + F.dropout(h, 0.2, self.training)
        x = x + F.dropout(self.mlp(self.norm2(x)), 0.2, self.training)
        return x, side + F.dropout(h, 0.2, self.training)


class TwoStreams(Stack):
    """Hands two streams from block to block."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = side = self.embedding(tokens)
        for block in self.blocks:
            x, side = block(x, side)
        return self.head(self.norm(x + side))


class Flattening(Parts):
    """Adds the MLP's output to tokens in one long row (OPT), and the attention's with axes swapped."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        swapped = x.transpose(0, 1)
        swapped = swapped + self.attention(self.norm1(x)).transpose(0, 1)
        x = swapped.transpose(0, 1)
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        return (x + self.mlp(self.norm2(x))).view(shape)


class FirstTokenApart(Parts):
    """Adds one branch to all tokens but the first, which is put in front of them again (TimeSformer's)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, rest = x[:, 0, :].unsqueeze(1), x[:, 1:, :]
        rest = rest + self.attention(self.norm1(rest))
        x = torch.cat((first, rest), 1)
        return x + self.mlp(self.norm2(x))


class FirstTokenCut(Parts):
    """Likewise, but no gradient goes through the first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rest = x[:, 1:] + self.attention(self.norm1(x[:, 1:]))
        x = torch.cat((x[:, :1].detach(), rest), 1)
        return x + self.mlp(self.norm2(x))


class AddingInDouble(Parts):
    """Adds in a wider dtype and rounds the sum."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x.double() + self.attention(self.norm1(x)).double() / 3).to(x.dtype)
        return (x.double() + self.mlp(self.norm2(x)).double() / 3).to(x.dtype)


class KeywordOnly(Block):
    """Takes its stream by keyword, and a mask that it never reads."""

    def forward(self, *, hidden_states: torch.Tensor, mask: Any = None) -> torch.Tensor:
        return super().forward(hidden_states)


class KeywordStack(Stack):
    """Calls blocks with keywords."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(hidden_states=x, mask=None)
        return self.head(self.norm(x))


class WithTuple(Block):
    """Returns a tuple, as transformers of old do."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return super().forward(x), None


@dataclass
class BlockOutput:
    """What `WithDataclass` returns."""

    hidden: torch.Tensor
    score: torch.Tensor


class WithDataclass(Block):
    """Returns the stream and a side value in a dataclass."""

    def forward(self, x: torch.Tensor) -> BlockOutput:
        h = self.attention(self.norm1(x))
        x = x + h
        return BlockOutput(x + self.mlp(self.norm2(x)), h.mean())


class TakingApart(Stack):
    """Unpacks what its blocks return."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            out = block(x)
            x = out[0] if isinstance(out, tuple) else out.hidden
        return self.head(self.norm(x))


class PreActivation(nn.Module):
    """The block of a pre-activation ResNet; its shortcut is projected where the width changes."""

    def __init__(self, width_in: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(width_in), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1)
        self.shortcut = nn.Conv2d(width_in, width, 1, stride) if width_in != width else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # here: buffer-write
        h = F.relu(self.norm1(x))
        skip = x if self.shortcut is None else self.shortcut(h)  # here: projected-shortcut
        return self.conv2(F.relu(self.norm2(self.conv1(h)))) + skip


class PreActivationResNet(nn.Module):
    """Two stages; the second begins with a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.stage1 = nn.Sequential(*(PreActivation(8, 8) for _ in range(3)))
        self.stage2 = nn.Sequential(PreActivation(8, 16, 2), PreActivation(16, 16), PreActivation(16, 16))
        self.head = nn.Linear(16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.stage2(self.stage1(self.stem(images))).mean((2, 3)))


class Loop(nn.Module):
    """No block modules: the adds stand in the loop."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(Attention() for _ in range(depth))
        self.mlps = nn.ModuleList(MLP() for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for attention, mlp, norm in zip(self.attentions, self.mlps, self.norms, strict=True):
            x = x + attention(x)
            x = x + mlp(norm(x))
        return x


class PostNormLoop(Loop):
    """A loop that normalises the sum."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for attention, norm in zip(self.attentions, self.norms, strict=True):
            x = norm(x + attention(x))  # here: post-norm
        return x


class SharedAdd(Loop):
    """Two streams by one add."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.flip(1)
        for mlp in self.mlps:
            x, y = (h + mlp(h) for h in (x, y))  # here: shared-add
        return x + y


class Skipping(Stack):
    """Layer-drop, by torch's generator."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # here: layer-drop
        x = self.embedding(tokens)
        for block in self.blocks:
            if self.training and torch.rand([]) < 0.1:
                continue
            x = block(x)
        return self.head(self.norm(x))


class SkippingInPython(Stack):
    """Layer-drop, by Python's generator."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # here: layer-drop
        x = self.embedding(tokens)
        for block in self.blocks:
            if self.training and random.random() < 0.1:
                continue
            x = block(x)
        return self.head(self.norm(x))


class Joint(Parts):
    """Image and text attend to each other; each has a stream of its own."""

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        length = text.shape[1]
        h = self.attention(self.norm1(torch.cat([text, image], 1)))
        text, image = text + h[:, :length], image + h[:, length:]
        text = text + self.mlp(self.norm2(text))
        return image + self.mlp(self.norm2(image + text.mean(1, keepdim=True))), text


class ReadingText(Parts):
    """The text is read, and goes on as it is."""

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> Any:  # here: other-streams
        h = self.attention(self.norm1(torch.cat([text, image], 1)))
        image = image + h[:, text.shape[1] :]
        return image + self.mlp(self.norm2(image)), text


class ImageAndText(Stack):
    """Two streams of the same width, and lengths of their own; only one is read in the end."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        image, text = self.embedding(tokens), self.embedding(tokens[:, :3])
        for block in self.blocks:
            image, text = block(image, text)
        return self.head(self.norm(image))


class Alternating(Stack):
    """Two streams whose blocks alternate: two chains."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        left = right = self.embedding(tokens)
        for number, block in enumerate(self.blocks):
            if number % 2:
                right = block(right)
            else:
                left = block(left)
        return self.head(self.norm(left + right))


class Exchanging(Parts):
    """RevNet's: each stream is given a function of the other."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x + self.attention(self.norm1(y))
        return x, y + self.mlp(self.norm2(x))


class AtOnce(Parts):
    """The same of the streams as they came in, so that neither reads itself."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x + self.attention(self.norm1(y)), y + self.mlp(self.norm2(x))


class TwoEmbeddings(Stack):
    """Two streams from the beginning, which hold different tensors."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, y = self.embedding(tokens), self.embedding(tokens.flip(1))
        for block in self.blocks:
            x, y = block(x, y)
        return self.head(self.norm(x + y))


class OnlyOne(Parts):
    """Stands alone in its model."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # here: single-block
        return x + self.mlp(self.norm1(x))


# -- caveats


class InPlace(Parts):
    """Adds to its argument in place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += self.attention(self.norm1(x))  # here: in-place-add
        x += self.mlp(self.norm2(x))  # here: in-place-add
        return x


class ExchangingInPlace(Parts):
    """RevNet's in place: it trains, as its branches save nothing of what they are given."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x += self.attention(torch.tanh(y))  # here: in-place-add
        y.add_(self.mlp(torch.tanh(x)))  # here: in-place-add
        return x, y


class Widening(Block):
    """Turns a half-precision stream into a float32 one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float() + self.attention(self.norm1(x.to(self.norm1.weight.dtype)))
        return x + self.mlp(self.norm2(x.to(self.norm2.weight.dtype)))  # here: stream-cast


class HalfPrecision(Stack):
    """Goes back to the weights' precision behind the last block."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x.to(self.norm.weight.dtype)))


class ReadingAClosure(Parts):
    """Reads a trained tensor that no argument and no parameter holds."""

    table = torch.ones(WIDTH, requires_grad=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # here: closure
        return x + self.mlp(self.norm1(x)) * self.table


class NormedOnce(Stack):
    """Replaces the stream once, in the middle."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for number, block in enumerate(self.blocks):
            if number == 2:
                x = self.norm(x)  # here: stream-replaced
            x = block(x)
        return self.head(x)


# -- refusals


class PostNorm(Parts):
    """The original Transformer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))  # here: post-norm


class GatedNorm(nn.LayerNorm):
    """A norm with a linear map of its own."""

    def __init__(self) -> None:
        super().__init__(WIDTH)
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        return x * torch.sigmoid(self.gate(x))


class PostGatedNorm(Parts):
    """The original Transformer, with another norm."""

    def __init__(self) -> None:
        super().__init__()
        self.gated = GatedNorm()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gated(x + self.mlp(x))  # here: post-norm


class PostActivation(Parts):
    """ResNet v1's way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.mlp(self.norm1(x)))  # here: post-activation


class NormedShortcut(Parts):
    """BLOOM's option: the skip starts behind the norm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        return h + self.mlp(h)  # here: normed-shortcut


class ProjectedShortcut(Parts):
    """A linear map on the skip."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(x) + self.mlp(self.norm1(x))  # here: projected-shortcut


class DetachedShortcut(Parts):
    """No gradient flows along the skip."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach() + self.mlp(self.norm1(x))  # here: detached


class DroppedStream(Parts):
    """Dropout on the sum instead of on the branch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mlp(self.norm1(x))
        return F.dropout(x, 0.1, self.training)  # here: stream-dropout


class PostNormWrittenOut(Parts):
    """A norm of the block's own, without a name that says so."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mlp(x)
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x * scale  # here: post-norm


class PermutedShortcut(Parts):
    """`P x + f(x)`: the shape is a residual block's, the elements are not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).reshape(x.shape) + self.mlp(self.norm1(x))  # here: permuted-shortcut


class UndoneTranspose(Parts):
    """The stream is transposed for the add and put back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turned = x.transpose(1, 2) + self.mlp(self.norm1(x)).transpose(1, 2)
        return turned.transpose(1, 2)


class LearnedShortcut(Parts):
    """The skip's factor is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((1,), 0.9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gain * x + self.mlp(self.norm1(x))  # here: scaled-shortcut


class ZeroedShortcut(Parts):
    """Nothing is left of the skip."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.gain * x  # here: scaled-shortcut
        return x + self.mlp(self.norm1(x))


class DoubledShortcut(Parts):
    """The stream is added to itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + x  # here: scaled-shortcut
        return x + self.mlp(self.norm1(x))


class Highway(Parts):
    """A highway gate weighs the skip."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(self.norm1(x))
        return gate * self.mlp(x) + (1 - gate) * x  # here: scaled-shortcut


class Broadcast(Parts):
    """The stream grows by an axis."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm1(x)).unsqueeze(0).expand(2, *x.shape)  # here: broadcast


class Pooling(Parts):
    """Halves the sequence."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mlp(self.norm1(x))
        return x[:, ::2]  # here: shape-change


class NotResidual(Parts):
    """A plain stack of layers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.norm1(x))


class Concatenating(Parts):
    """DenseNet's way: the input is kept beside the branch, not summed with it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(torch.cat([x[..., :8], self.norm1(x)[..., 8:]], -1))


class DataDependent(Parts):
    """Chooses its branch by what the stream holds."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:  # here: data-dependent
            return x + self.mlp(self.norm1(x))
        return x + self.attention(self.norm1(x))


class DroppingItself(Block):
    """Layer-drop inside the block."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # here: layer-drop
        if self.training and random.random() < 0.1:
            return x
        return super().forward(x)


class OnceOnly(Block):
    """Cannot run twice on the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.ran = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.ran:
            raise RuntimeError("it ran already")  # here: not-repeatable
        self.ran = True
        return super().forward(x)


class Unseen(Parts):
    """Computes with an operator that torch functions do not see."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunction():
            h = torch.tanh(x)
        return x + self.mlp(h)  # here: unseen-code


class InPlaceActivation(Parts):
    """Overwrites the stream before it is added."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(x, inplace=True)  # here: in-place
        return x + self.mlp(h)


class WritingItsMask(Parts):
    """Overwrites an argument other than the stream."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        mask.mul_(0.5)  # here: argument-write
        return x + self.mlp(self.norm1(x) * mask)


class MaskedStack(Stack):
    """Hands one mask to all blocks."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        mask = torch.ones_like(x)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


class AddingToItsSide(Parts):
    """Adds in place to a second stream, which `Unheard` does not hand on."""

    def forward(self, x: torch.Tensor, side: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x + self.attention(self.norm1(x))
        side += self.mlp(torch.tanh(x))  # here: argument-write
        return x, side


class Unheard(Stack):
    """Gives every block the same side."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, side = self.embedding(tokens), self.embedding(tokens.flip(1))
        for block in self.blocks:
            x, _ = block(x, side + 0)
        return self.head(self.norm(x))


class WithInnerStream(Parts):
    """Also returns the stream from between its steps."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # here: aux-output
        h = x + self.attention(self.norm1(x))
        return h + self.mlp(self.norm2(h)), h


class WithObject(Block):
    """Also returns an object that cannot be rebuilt."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, object]:  # here: aux-output
        return super().forward(x), object()


class Between(Stack):
    """Does something to the stream between any two blocks."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = self.norm(block(x))  # here: stream-replaced
        return self.head(x)


class EarlyExit(Stack):
    """Leaves after two blocks."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks[:2]:
            x = block(x)
        return self.head(self.norm(x))


class DeeplySupervised(Stack):
    """Reads the stream between its blocks."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        total = torch.zeros(())
        for block in self.blocks:
            x = block(x)
            total = total + x.square().mean()  # here: stream-read
        return self.head(x) + total


class Collecting(Stack):
    """Returns every state of its stream."""

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:  # here: stream-read
        states = [self.embedding(tokens)]
        for block in self.blocks:
            states.append(block(states[-1]))
        return tuple(states)


class Remembering(Block):
    """Appends what it computed to a list that it is given: a cache."""

    def forward(self, x: torch.Tensor, cache: list[torch.Tensor]) -> torch.Tensor:  # here: argument-write
        cache.append(x)
        return super().forward(x)


class RememberingStack(Stack):
    """Hands one cache to all blocks."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        cache: list[torch.Tensor] = []
        for block in self.blocks:
            x = block(x, cache)
        return self.head(self.norm(x))


class Inside(Block):
    """Runs in `Forgetting`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # here: own-backward
        return super().forward(x)


class Forgetting(torch.autograd.Function):
    """Runs blocks without autograd; backward runs them again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, blocks: nn.ModuleList) -> torch.Tensor:
        ctx.blocks = blocks
        ctx.save_for_backward(x)
        for block in blocks:
            x = block(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            y = x = x.detach().requires_grad_()
            for block in ctx.blocks:
                y = block(y)
            y.backward(gradient)
        return x.grad, None


class ReversibleAlready(Stack):
    """Keeps nothing between its blocks."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(Forgetting.apply(self.embedding(tokens), self.blocks)))


class HyperConnected(Parts):
    """Several copies of the stream, mixed by a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.eye(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        added = self.mlp(self.norm1(x.unflatten(0, (2, -1)).mean(0)))
        mixed = torch.einsum("ij,jbtd->ibtd", self.mix, x.unflatten(0, (2, -1)))  # here: projected-shortcut
        return (mixed + added).flatten(0, 1)
