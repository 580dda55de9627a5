"""How an optimiser runs: its rule, its kernels, where its state lies, and when it updates a weight.

An optimiser has one spelling, `NAME` or `NAME:option=value`, in Python, on the command line and in records:

    adamw  sgd  sgd-momentum                 torch's own; each takes foreach=on|off (else torch chooses: on on a GPU)
    adamw-fused                              torch's own, in one kernel
    adamw-8bit  adamw-paged  adamw-8bit-paged      bitsandbytes'
    adamw-host[:gradients=host]              torchao's CPUOffloadOptimizer
    every one but adamw-host takes step=backward
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from autorev.errors import SettingError

MOMENTUM = 0.9
"""Of sgd-momentum."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What is said of the optimisers of one name."""

    title: str
    library: str
    """The package that has it."""
    trainer: str | None
    """What `transformers.TrainingArguments.optim` calls it; None: nothing."""


KINDS: dict[str, Kind] = {
    "adamw": Kind("AdamW", "torch", "adamw_torch"),
    "adamw-fused": Kind("fused AdamW", "torch", "adamw_torch_fused"),
    "adamw-8bit": Kind("8-bit AdamW", "bitsandbytes", "adamw_bnb_8bit"),
    "adamw-paged": Kind("paged AdamW", "bitsandbytes", "paged_adamw_32bit"),
    "adamw-8bit-paged": Kind("paged 8-bit AdamW", "bitsandbytes", "paged_adamw_8bit"),
    "adamw-host": Kind("AdamW on the host", "torchao", None),
    "sgd": Kind("SGD", "torch", "sgd"),
    "sgd-momentum": Kind("SGD with momentum", "torch", None),
}
_OPTIONS: dict[str, tuple[str, ...]] = {"foreach": ("on", "off"), "step": ("backward",), "gradients": ("host",)}


@dataclass(frozen=True, slots=True)
class Optimizer:
    """One way to update the weights. `str` of it is its spelling, which `parse` reads.

    Raises:
        SettingError: there is none of that name, or it has no such option.
    """

    name: str
    foreach: Literal["on", "off"] | None = None
    """All parameters at once, or one after the other; None: as torch chooses."""
    step: Literal["backward"] | None = None
    """backward: each parameter is updated as soon as its gradient is there, which is then freed (torch's tutorial "How
    to save memory by fusing the optimizer step into the backward pass"). None: all after backward."""
    gradients: Literal["host"] | None = None
    """host: a gradient goes to the host as soon as it is there, and is freed. None: it stays until the step."""

    def __post_init__(self) -> None:
        if self.name not in KINDS:
            *others, last = KINDS
            raise SettingError(f"optimizer is {', '.join(others)} or {last}, not {self.name!r}")
        for option, values in _OPTIONS.items():
            value = getattr(self, option)
            if value is not None and option not in _options(self.name):
                raise SettingError(f"the optimizer {self.name} has no {option}; {_takes(self.name)}")
            if value is not None and value not in values:
                raise SettingError(f"{option} of the optimizer {self.name} is {' or '.join(values)}, not {value!r}")

    @classmethod
    def parse(cls, text: str) -> Optimizer:
        """The optimiser that `text` spells.

        Raises:
            SettingError: it spells none.
        """
        if not isinstance(text, str):
            raise SettingError(f"an optimizer is named by text, such as adamw-fused:step=backward, not {text!r}")
        name, _, rest = text.strip().partition(":")
        options: dict[str, str] = {}
        for part in filter(None, rest.split(",")):
            option, equals, value = (piece.strip() for piece in part.partition("="))
            if name in KINDS and (not equals or option not in _options(name)):
                raise SettingError(f"the optimizer {name} has no option {part!r}; {_takes(name)}")
            if option in options:
                raise SettingError(f"the optimizer {text} gives {option} twice; leave one out")
            options[option] = value
        return cls(name, **options) if name in KINDS else cls(name)  # type: ignore[arg-type]  # looked at when made

    def __str__(self) -> str:
        said = [f"{f.name}={getattr(self, f.name)}" for f in fields(self)[1:] if getattr(self, f.name) is not None]
        return f"{self.name}:{','.join(said)}" if said else self.name

    @property
    def title(self) -> str:
        """`fused AdamW, stepping in backward`."""
        said = {
            "foreach": {"on": "all parameters at once", "off": "one parameter after the other"},
            "step": {"backward": "stepping in backward"},
            "gradients": {"host": "gradients there, too"},
        }
        added = [words[getattr(self, option)] for option, words in said.items() if getattr(self, option) is not None]
        return ", ".join([KINDS[self.name].title, *added])

    @property
    def library(self) -> str:
        """The package that has it."""
        return KINDS[self.name].library

    @property
    def momenta(self) -> int:
        """Numbers that it keeps of each weight."""
        return {"sgd": 0, "sgd-momentum": 1}.get(self.name, 2)

    @property
    def is_8bit(self) -> bool:
        """Does it round its state to 8 bits?"""
        return "8bit" in self.name

    @property
    def paged(self) -> bool:
        """Can its state be moved to the host, page by page?"""
        return self.name.endswith("paged")

    @property
    def on_host(self) -> bool:
        """Does the host hold its state, and run the step?"""
        return self.name == "adamw-host"

    @property
    def frees_gradients(self) -> bool:
        """Is a gradient gone as soon as it is there? Then those of several passes cannot be added up."""
        return self.step == "backward" or self.gradients == "host"

    @property
    def during_backward(self) -> bool:
        """Does it take gradients one by one? Then they are never all there to be clipped by their norm."""
        return self.step == "backward" or self.on_host

    def check_device(self, kind: str) -> None:
        """Raise unless it can update weights on a device of that kind (cuda or cpu).

        Raises:
            SettingError: it cannot.
        """
        if (self.paged or self.on_host) and kind != "cuda":
            raise SettingError(
                f"{self} moves state between a GPU and its host, and here the host is all there is; adamw-fused and "
                "adamw-8bit do without"
            )

    def check_gpus(self, gpus: int, shard: str) -> None:
        """Raise where nothing is known of it on so many GPUs, with weights and states divided as `shard` says.

        Raises:
            SettingError: that is so.
        """
        if gpus > 1 and self.during_backward:
            raise SettingError(
                f"{self} takes each gradient as soon as it is there, which is before it is summed over {gpus} GPUs; "
                "adamw-fused waits for that"
            )
        if shard != "none" and self.library != "torch":
            raise SettingError(
                f"{self} is not predicted on parts of weights, which `shard={shard}` gives it; use adamw-fused, or "
                "leave `shard` out"
            )

    def check_step(self, accumulate: int = 1, clip: float | None = None, processes: int = 1) -> None:
        """Raise unless it can take a step of so many passes in so many processes (or GPUs of one process), with
        gradients clipped to the norm `clip` (0: not at all).

        Raises:
            SettingError: it cannot.
        """
        if self.frees_gradients and accumulate > 1:
            raise SettingError(
                f"{self} takes each gradient as soon as it is there, so those of {accumulate} passes are never added "
                "up; leave `accumulate` out, and raise `batch`"
            )
        if self.during_backward and processes > 1:
            raise SettingError(
                f"{self} takes each gradient as soon as it is there, before those of {processes} processes are "
                "averaged; train in one, or choose another optimizer"
            )
        if self.during_backward and clip:
            raise SettingError(
                f"{self} takes each gradient as soon as it is there, so their common norm is not known in time to clip "
                "them; leave `clip` out, or set it to 0"
            )


def _options(name: str) -> tuple[str, ...]:
    """What the optimiser of that name can be told."""
    if name == "adamw-host":
        return ("gradients",)
    return ("foreach", "step") if name in ("adamw", "sgd", "sgd-momentum") else ("step",)


def _takes(name: str) -> str:
    return "it takes " + ", ".join(f"{option}={'|'.join(_OPTIONS[option])}" for option in _options(name))
