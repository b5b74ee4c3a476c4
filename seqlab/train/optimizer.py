"""AdamW with clipping, warm-up and a schedule; what must not decay does not."""

from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from pydantic.dataclasses import dataclass

from seqlab.errors import ConfigError


@dataclass(frozen=True)
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
        if self.lr <= 0 or self.clip <= 0:
            raise ConfigError(f"optimizer.lr and clip must be above 0, not {self.lr}, {self.clip}.")
        if self.warmup < 0 or not 0 <= self.final <= 1 or not 0 < self.decay <= 1:
            raise ConfigError("optimizer needs warmup >= 0, final in [0, 1] and decay in (0, 1].")

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
