"""What a mixer can keep track of: the parity of all bits so far, four times longer than trained.

A memory whose eigenvalues are all positive can only fade; to turn a sign round at every 1 takes
eigenvalues down to -1 (Grazzi et al., 2024).
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import seqlab
from seqlab.layers import ffn
from seqlab.layers.registry import mixer_config
from seqlab.models import lm

TRAINED, TESTED, STEPS, BATCH = 24, 96, 250, 64


def test_parity_is_tracked_with_negative_eigenvalues():
    assert accuracy(negative_eigenvalues=True) == 1.0


def test_parity_is_guessed_without_negative_eigenvalues():
    assert 0.4 < accuracy(negative_eigenvalues=False) < 0.6


def accuracy(negative_eigenvalues: bool) -> float:
    """Of the running parity at the last eight of 96 tokens, after training on 24."""
    mixer = mixer_config(
        "delta_net",
        heads=2,
        conv_width=0,
        chunk_size=16,
        negative_eigenvalues=negative_eigenvalues,
    )
    small = {"d_model": 32, "ffn": ffn.Config(ratio=2.0), "tie_embeddings": False}
    model = trained(seqlab.build(lm.Config(vocab=2, pattern=(mixer,), **small)))
    bits, parity = batch(np.random.default_rng(1), TESTED)
    logits, _ = jax.jit(lambda model, bits: model(bits))(model, bits)
    return float(jnp.mean((jnp.argmax(logits, -1) == parity)[:, -8:]))


def batch(rng: np.random.Generator, T: int):
    bits = rng.integers(0, 2, (BATCH, T), np.int32)
    return bits, np.cumsum(bits, 1) % 2


def trained(model: seqlab.LM) -> seqlab.LM:
    schedule = optax.cosine_decay_schedule(1e-2, STEPS)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def loss(model, bits, parity):
        logits, _ = model(bits)
        return optax.softmax_cross_entropy_with_integer_labels(logits, parity).mean()

    @jax.jit
    def step(model, state, bits, parity):
        updates, state = optimizer.update(jax.grad(loss)(model, bits, parity), state, model)
        return optax.apply_updates(model, updates), state

    rng, state = np.random.default_rng(0), optimizer.init(model)
    for _ in range(STEPS):
        model, state = step(model, state, *batch(rng, TRAINED))
    return model
