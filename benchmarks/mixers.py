"""What every mixer costs, and how it compares with other people's code on this machine.

    python -m benchmarks.mixers [MIXER ...]

First each mixer alone, one layer of width 512 on two rows of 1,024 tokens: forward, forward and
backward, a step of decoding, the memory of a program that takes gradients, the state of a sequence.
Then races, in turns: one-layer models of transformers against the same models here, and functions
of other JAX packages against our kernels. A ratio above 1 is for us. On a machine with other work,
read the ratio of CPU seconds.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import benchmarks.record as record
from benchmarks import jax_peers, published
from seqlab.bench import timing
from seqlab.conformance import tolerance
from seqlab.layers.registry import mixer_config, own_mixers

B, T, D, ROUNDS = 2, 1024, 512, 5
#: Sizes that suit the width better than the defaults, which are tiny.
FIELDS = {
    "attention": {"heads": 8, "max_length": T},
    "learned_positions": {"max_length": T},
    "mamba2": {"head_dim": 64, "d_state": 128},
    "mla": {"max_length": T},
    "zamba2": {"max_length": T},
}


def main(names: list[str]) -> int:
    rows = [alone(name) for name in names or own_mixers()]
    races = [] if names else [*against_transformers(), *against_jax()]
    code = record.record("mixers", rows, [])
    return (
        code
        if not races
        else record.record("mixers_raced", races, [record.claim(r) for r in races])
    )


def alone(name: str) -> dict:
    """One layer of a mixer by itself."""
    config = mixer_config(name, **FIELDS.get(name, {}))
    mixer = jax.jit(lambda: config.build(D, rngs=nnx.Rngs(0)))()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)
    forward = jax.jit(lambda mixer, x, state: mixer(x, state))
    loss = lambda mixer, x, state: jnp.sum(jnp.square(mixer(x, state)[0]))
    both = jax.jit(jax.grad(loss, (0, 1), allow_int=True))
    state = mixer.init_state(B)
    program = both.lower(mixer, x, state).compile()
    time = lambda work: timing.seconds(lambda: jax.block_until_ready(work()), ROUNDS).median
    row = {
        "mixer": name,
        "forward ms": 1e3 * time(lambda: forward(mixer, x, state)),
        "forward and backward ms": 1e3 * time(lambda: program(mixer, x, state)),
        "decode us": 1e6 * time(lambda: forward(mixer, x[:, :1], state)),
        "bytes for gradients": program.memory_analysis().temp_size_in_bytes,
        "state bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(mixer.init_state(1))),
    }
    print(row, flush=True)
    return row


def against_transformers() -> list[dict]:
    """One layer, its embedding and its head: small beside it."""
    rows = []
    for name in published.CONFIGS:
        pair = published.pair(name, 1, T)
        if pair is None:
            continue
        length = 128 if name == "mamba" else T  # token by token there
        ours = published.our_passes(pair.ours, B, length)
        theirs = published.their_passes(pair.theirs, B, length)
        rows += [
            record.raced(name, "transformers", w, length, ours[w], theirs[w], turns(w))
            for w in theirs
        ]
    return rows


def turns(which: str) -> int:
    return 40 if which == "decode" else ROUNDS


def against_jax() -> list[dict]:
    return [row for peer in jax_peers.peers() for row in against(peer)]


def against(peer: jax_peers.Peer) -> list[dict]:
    """Forward, and forward and backward where the peer's gradient runs at all."""
    wrong = tolerance.error(jax.jit(peer.theirs)(*peer.arrays), jax.jit(peer.ours)(*peer.arrays))
    if wrong > 1e-3:
        print(f"{peer.name} of {peer.package} is another function: {wrong:.0%} away", flush=True)
        return []
    every = tuple(range(len(peer.arrays)))
    gradients = lambda f: jax.grad(lambda *a: jnp.sum(jnp.square(f(*a))), every)
    rows = []
    for what, form in (("forward", lambda f: f), ("forward and backward", gradients)):
        ours, theirs = (jax.jit(form(f)) for f in (peer.ours, peer.theirs))
        wait = lambda f: lambda: jax.block_until_ready(f(*peer.arrays))
        try:
            both = wait(ours), wait(theirs)
            name, package = peer.name, peer.package
            rows.append(record.raced(name, package, what, jax_peers.T, *both, turns(what)))
        except Exception as broken:
            print(f"{peer.name} of {peer.package}, {what}: {type(broken).__name__}", flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
