"""AdamW with clipping, warm-up and a schedule; what must not decay does not."""

import math
from collections.abc import Callable, Mapping
from typing import Literal

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

    def __post_init__(self):
        for name, right, allowed in (
            ("lr", 0 < self.lr < math.inf, "above 0"),
            ("clip", self.clip > 0, "above 0"),
            ("eps", self.eps > 0, "above 0"),
            ("warmup", self.warmup >= 0, "0 or more"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more"),
            ("final", 0 <= self.final <= 1, "from 0 to 1"),
            ("decay", 0 < self.decay <= 1, "above 0 and up to 1"),
            ("betas", all(0 <= beta < 1 for beta in self.betas), "from 0 up to, but not, 1"),
        ):
            if not right:
                raise ConfigError(f"optimizer.{name} is {getattr(self, name)}: make it {allowed}.")

    def learning_rate(self, steps: int) -> Callable[[jax.Array], jax.Array]:
        """step (0-based) -> learning rate, for a run of `steps` steps."""

        def rate(step):
            warm = jnp.minimum(1.0, (step + 1) / max(self.warmup, 1))
            if self.schedule == "constant":
                return self.lr * warm
            if self.schedule == "wsd":
                tail = max(round(steps * self.decay), 1)
                left = jnp.clip((steps - step) / tail, 0, 1)
                return self.lr * warm * (self.final + (1 - self.final) * left)
            done = jnp.clip((step - self.warmup) / max(steps - self.warmup, 1), 0, 1)
            shape = 0.5 * (1 + jnp.cos(jnp.pi * done))
            return self.lr * warm * (self.final + (1 - self.final) * shape)

        return rate

    def build(self, steps: int, decays: Mapping[str, bool]) -> optax.GradientTransformation:
        """`decays` says of every weight whether it decays (see `models.parameters.decays`).

        An update with a NaN or an infinity in it is skipped and counted, never applied.
        """
        adamw = optax.adamw(
            self.learning_rate(steps),
            *self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            mask=dict(decays),
        )
        clipped = optax.chain(optax.clip_by_global_norm(self.clip), adamw)
        return optax.apply_if_finite(clipped, max_consecutive_errors=2**31 - 1)
