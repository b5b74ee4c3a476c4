"""Published ways to linearize a transformer, as data: what takes attention's place, and the stages
of training that follow, with the papers' numbers.

Papers give tokens, rows and rates for models of 1 to 70 billion parameters; every field can be set
anew, `stages.0.tokens=200000`. LoLCATs and Liger lower their rate where ten evaluations bring no
progress, which in runs as short as theirs hardly happens: here the rate stays.
"""

import functools
import math
from typing import Annotated, Literal

from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError, DataError
from seqlab.linearize.losses import Kind
from seqlab.settings import STRICT, NonNegativeFinite, PositiveFinite
from seqlab.train.optimizer import Config as Optimizer

Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, config=STRICT)
class Lora:
    """W + alpha / rank * A B beside the linear maps that `on` names (Hu et al., 2021); q, k, v and
    out are whichever maps of a mixer have their part, if they are called otherwise there."""

    rank: PositiveInt = 8
    alpha: PositiveFinite = 16.0
    on: tuple[str, ...] = ("q", "k", "v")


@dataclass(frozen=True, config=STRICT)
class Stage:
    """One training run of the student.

    loss    layer: each replaced mixer's output, shown the teacher's input; hidden: the last hidden
            vectors; kl: the teacher's distribution of the next token, times `w_kl`, and the next
            token itself, times `w_ce`; ce: the next token
    train   extra: what the new mixers have and attention had not; lora: adapters of what attention
            had, as `lora` says, merged at the end; mixer: all of the replaced mixers; all
    tokens  to be predicted, in steps of `batch` rows of `length` tokens
    epochs  how often the data may be read for that, at most; the papers read theirs twice
    warmup  as a share of the steps; lr, schedule, final, betas, eps, clip, weight_decay: as in
            `train.optimizer`
    """

    loss: Kind
    train: Literal["extra", "lora", "mixer", "all"]
    tokens: PositiveInt
    lr: PositiveFinite
    length: PositiveInt = 1024
    batch: PositiveInt = 8
    epochs: PositiveFinite = 2.0
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: Share = 0.0
    final: Share = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: PositiveFinite = 1e-8
    clip: PositiveFinite = 1.0
    weight_decay: NonNegativeFinite = 0.0
    lora: Lora | None = None
    w_kl: NonNegativeFinite = 1.0
    w_ce: NonNegativeFinite = 0.0

    def __post_init__(self):
        if (self.train == "lora") != (self.lora is not None):
            raise ConfigError(
                f"A stage with train={self.train!r} has lora={self.lora}: adapters are given where "
                "they train, and there alone."
            )
        if self.loss == "layer" and self.train == "all":
            raise ConfigError(
                "The loss of layers says nothing of what is outside of mixers: set train='mixer'."
            )

    @property
    def steps(self) -> int:
        """How many predict the tokens; the last may predict a few more."""
        return math.ceil(self.tokens / (self.batch * self.length))

    @property
    def predicted(self) -> int:
        """Tokens of all its steps."""
        return self.steps * self.batch * self.length

    def require(self, held: int, name: str) -> None:
        """Raises DataError where data of so many tokens is too short for this stage, `name`."""
        if held * self.epochs < self.tokens:
            raise DataError(
                f"The stage {name} asks for {self.tokens:,} tokens and the data has {held:,}, to "
                f"be read {self.epochs:g} times at most: give more text, lower the stage's tokens, "
                "or raise its epochs."
            )

    def optimizer(self) -> Optimizer:
        """Of the train run."""
        return Optimizer(
            lr=self.lr,
            schedule=self.schedule,
            warmup=round(self.warmup * self.steps),
            final=self.final,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            clip=self.clip,
        )


@dataclass(frozen=True, config=STRICT)
class Method:
    """target: a preset of `linearize.presets`, or any mixer by its name, which every recipe can
    train; source: where the numbers are from."""

    target: str
    stages: tuple[Stage, ...]
    source: str


#: Attention transfer, then next tokens by adapters, on 2 epochs of 50,000 rows of Alpaca each.
_layer = functools.partial(Stage, loss="layer", train="extra", tokens=20_000_000)
_adapt = functools.partial(Stage, loss="ce", train="lora", tokens=20_000_000)

#: The library that Liger's code adapts with takes alpha = 8 unless told otherwise.
_LIGER = (_adapt(lr=1e-3, schedule="constant", weight_decay=0.01, lora=Lora(alpha=8.0)),)

_LOLCATS = (
    _layer(lr=1e-2, schedule="constant"),
    _adapt(lr=1e-4, schedule="constant", lora=Lora(on=("q", "k", "v", "out"))),
)

_LIZARD = (
    _layer(lr=1e-3, length=2048, betas=(0.9, 0.99), warmup=0.1),
    _adapt(lr=5e-4, length=2048, betas=(0.9, 0.99), warmup=0.1, lora=Lora()),
)

_align = functools.partial(
    Stage, loss="layer", train="mixer", tokens=100_000_000, lr=1e-3, final=0.01, betas=(0.9, 0.95)
)
_whole = functools.partial(Stage, train="all")
_late = functools.partial(_whole, lr=1e-5, schedule="constant", betas=(0.9, 0.95), batch=96)
_RADLADS = (
    _align(length=512, batch=32),
    _late(loss="kl", tokens=500_000_000, length=512),
    _late(loss="ce", tokens=100_000_000, length=16_384),
)

#: Aligning the layers first is optional there and its numbers are not given: they are RADLADS'.
_MAMBA_IN_LLAMA = (
    _align(length=2048, batch=64),
    _whole(
        loss="kl",
        tokens=20_000_000_000,
        lr=2e-5,
        length=2048,
        batch=64,
        warmup=0.01,
        final=0.0,
        clip=0.1,
    ),
)

_T2R = (_whole(loss="ce", tokens=3_500_000_000, lr=1e-5, warmup=0.01),)
_SUPRA = (_whole(loss="ce", tokens=100_000_000_000, lr=3e-4, length=2048, batch=64, warmup=0.01),)

_LIZARD_PAPER = "Lizard (Nguyen et al., 2025)"

#: Whole methods, by name; each preset of `linearize.presets` has one of its name.
METHODS: dict[str, Method] = {
    **{
        name: Method(name, _LIGER, "Liger (Lan et al., 2025)")
        for name in ("liger", "liger_hgrn2", "liger_gsa", "liger_mamba2")
    },
    "lizard": Method("lizard", _LIZARD, _LIZARD_PAPER),
    "lizard_rope": Method("lizard_rope", _LIZARD, f"{_LIZARD_PAPER}, its window with RoPE"),
    "lolcats": Method("lolcats", _LOLCATS, "LoLCATs (Zhang et al., 2024)"),
    "hedgehog": Method("hedgehog", _LOLCATS, "Hedgehog (Zhang et al., 2024), by LoLCATs' stages"),
    "t2r": Method("t2r", _T2R, "T2R (Kasai et al., 2021); the rate is ours"),
    "supra": Method("supra", _SUPRA, "SUPRA (Mercat et al., 2024)"),
    "mamba_in_llama": Method("mamba2", _MAMBA_IN_LLAMA, "Mamba in the Llama (Wang et al., 2024)"),
    "radlads": Method("rwkv7", _RADLADS, "RADLADS (Goldstein et al., 2025)"),
    "swa": Method("swa", (), "a sliding window, nothing trains"),
    "swa_sink": Method("swa_sink", (), "attention sinks (Xiao et al., 2023), nothing trains"),
}
