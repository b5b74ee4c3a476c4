"""AdamW with clipping, warm-up and a schedule; what must not decay does not."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError
from seqlab.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class Config:
    """The learning rate rises linearly to `lr` over `warmup` steps, then falls to `lr * final`.

    cosine  falls along half a cosine until the last step
    wsd     stays (warm-up, stable, decay), then falls linearly over the last `decay` of all steps

    In the second half of all steps, the rate is `second_half` of what that says, and weight decay
    `second_half_decay` of `weight_decay`, as for ternary weights: the MatMul-free LM halves its
    rate (Zhu et al., 2024), BitNet b1.58 stops decaying. What a step takes off a weight is the
    product of both.
    """

    lr: float = 3e-3
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: int = 20
    final: float = 0.1
    decay: float = 0.2
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    second_half: float = 1.0
    second_half_decay: float = 1.0

    def __post_init__(self):
        for name, right, allowed in (
            ("lr", 0 < self.lr < math.inf, "above 0"),
            ("clip", self.clip > 0, "above 0"),
            ("eps", self.eps > 0, "above 0"),
            ("warmup", self.warmup >= 0, "0 or more"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more"),
            ("final", 0 <= self.final <= 1, "from 0 to 1"),
            ("second_half", 0 < self.second_half <= 1, "above 0 and up to 1"),
            ("second_half_decay", 0 <= self.second_half_decay <= 1, "from 0 to 1"),
            ("decay", 0 < self.decay <= 1, "above 0 and up to 1"),
            ("betas", all(0 <= beta < 1 for beta in self.betas), "from 0 up to, but not, 1"),
        ):
            if not right:
                raise ConfigError(f"optimizer.{name} is {getattr(self, name)}: make it {allowed}.")

    def learning_rate(self, steps: int) -> Callable[[Any], jax.Array]:
        """step (0-based; one or an array) -> learning rate, for a run of `steps` steps."""

        def rate(step):
            warm = jnp.minimum(1.0, (step + 1) / max(self.warmup, 1))
            late = jnp.where(2 * step < steps, 1.0, self.second_half)
            return self.lr * warm * self._shape(step, steps) * late

        return rate

    def _shape(self, step, steps: int):
        """Of the schedule after warm-up, from 1 to `final`."""
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "wsd":
            left = jnp.clip((steps - step) / max(round(steps * self.decay), 1), 0, 1)
        else:
            done = jnp.clip((step - self.warmup) / max(steps - self.warmup, 1), 0, 1)
            left = 0.5 * (1 + jnp.cos(jnp.pi * done))
        return self.final + (1 - self.final) * left

    def build(self, steps: int, decays: Mapping[str, bool]) -> optax.GradientTransformation:
        """`decays` says of every weight whether it decays (see `models.parameters.decays`).

        An update with a NaN or an infinity in it is skipped and counted, never applied.
        """
        late = lambda step: (
            self.weight_decay * jnp.where(2 * step < steps, 1.0, self.second_half_decay)
        )
        adamw = optax.adamw(
            self.learning_rate(steps),
            *self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay if self.second_half_decay == 1 else late,
            mask=dict(decays),
        )
        clipped = optax.chain(optax.clip_by_global_norm(self.clip), adamw)
        return optax.apply_if_finite(clipped, max_consecutive_errors=2**31 - 1)
