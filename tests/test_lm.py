"""The model obeys the same law as its mixers, at every depth and on any mesh."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.compile import equations
from seqlab import settings
from seqlab.conformance.tolerance import GRADIENT, assert_close
from seqlab.errors import ConfigError, ModelError
from seqlab.layers import ffn, norm
from seqlab.layers.mixer import Mixer
from seqlab.layers.mixers import attention, gla, mamba2
from seqlab.models import block as blocks
from seqlab.models import depth, lm
from seqlab.models.block import Block, Join
from seqlab.models.parameters import axes, bind, decays, parameters
from seqlab.models.summary import parameter_count, state_bytes, table
from seqlab.parallel.mesh import use_mesh, weight_shardings
from seqlab.train.corpus import Batch
from seqlab.train.step import loss

PATTERN = (gla.Config(), attention.Config(window=8))
CONFIG = lm.Config(vocab=64, d_model=32, pattern=PATTERN, repeats=2, dtype="float32")


def build(config=CONFIG, seed=0):
    return config.build(rngs=nnx.Rngs(seed))


@jax.jit
def run(model, tokens, state=None, reset=None):
    return model(tokens, state, reset=reset)


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(0), (2, 32), 0, CONFIG.vocab)


def test_pieces_equal_the_whole(model, tokens):
    reset = jnp.zeros((2, 32), bool).at[0, 11].set(True).at[1, 25].set(True)
    expected, last = run(model, tokens, None, reset)
    first, state = run(model, tokens[:, :16], None, reset[:, :16])
    second, state = run(model, tokens[:, 16:], state, reset[:, 16:])
    assert_close(jnp.concatenate([first, second], 1), expected, GRADIENT)
    assert_close(state, last, GRADIENT)


def test_logits_and_states_are_float32_when_computing_in_bfloat16(tokens):
    narrow = build(settings.override(CONFIG, ["dtype=bfloat16"]))
    x, state = jax.eval_shape(narrow.hidden, tokens)
    assert (x.dtype, jax.eval_shape(narrow.logits, x).dtype) == (jnp.bfloat16, jnp.float32)
    floats = [a for a in jax.tree.leaves(state) if jnp.issubdtype(a.dtype, jnp.floating)]
    assert {a.dtype for a in floats} == {jnp.dtype("float32")}


@jax.jit
def gradient(model, params, batch):
    return jax.grad(lambda params: loss(bind(model, params), batch).nats)(params)


@pytest.mark.parametrize("how", ["remat=none", "remat=all", "unroll=2"])
def test_how_depth_is_run_changes_no_gradient(model, tokens, how):
    other, batch = settings.override(CONFIG, [how]).skeleton(), Batch(tokens, jnp.ones_like(tokens))
    params, wanted = parameters(model), gradient(model, parameters(model), batch)
    assert_close(gradient(bind(other, params), params, batch), wanted, GRADIENT)


def test_blocks_lie_one_by_one_however_depth_is_unrolled(tokens):
    model = build(settings.override(CONFIG, ["unroll=2"]))
    flat, state = depth.unstacked(model, model.init_state(2))
    assert_close(run(flat, tokens, state)[0], run(model, tokens)[0], GRADIENT)


def test_cheap_recomputation_runs_no_kernel_again(tokens):
    def loops(how):  # rotation, which has one too, is cheap
        config = settings.override(CONFIG, [how, "pattern.1.rope_base=null"])
        model, batch = build(config), Batch(tokens, jnp.ones_like(tokens))
        nats = jax.grad(lambda params, model: loss(bind(model, params), batch).nats)
        jaxpr = jax.make_jaxpr(nats)(parameters(model), model).jaxpr
        return sum(e.primitive.name in ("scan", "while") for e in equations(jaxpr))

    assert loops("remat=none") == loops("remat=cheap") < loops("remat=all")


def test_sharded_loss_and_gradients_equal_one_device(model):
    tokens = jax.random.randint(jax.random.key(1), (4, 33), 0, CONFIG.vocab)
    segments = jnp.broadcast_to(1 + (jnp.arange(33) >= 20), tokens.shape)
    batch = Batch(tokens, segments)
    both = lambda: jax.jit(jax.value_and_grad(lambda p: loss(bind(model, p), batch).nats))
    params = parameters(model)
    expected = both()(params)
    with use_mesh(data=2, seq=2, model=2) as mesh:
        shapes = {name: a.shape for name, a in params.items()}
        placed = jax.device_put(params, weight_shardings(shapes, axes(model), mesh))
        assert placed["embed.weight"].sharding.spec == jax.P("model", "data")
        actual = both()(placed)
    assert_close(actual, expected, GRADIENT)


def test_the_program_is_as_large_for_any_depth_and_length():
    def count(repeats, T):
        model = build(settings.override(CONFIG, [f"repeats={repeats}"]))
        tokens = jnp.zeros((1, T), jnp.int32)
        jaxpr = jax.make_jaxpr(lambda model, tokens: model(tokens)[0])(model, tokens)
        return sum(1 for _ in equations(jaxpr.jaxpr))

    assert count(2, 256) == count(4, 256) == count(2, 1024)


def test_names_are_flat_and_stacked_over_depth(model):
    params = parameters(model)
    assert params["blocks.0.mixer.qkv.weight"].shape == (2, 32, 64)
    assert params["blocks.1.mixer.q.weight"].shape == (2, 32, 32)
    assert "head.weight" not in params
    untied = parameters(build(settings.override(CONFIG, ["tie_embeddings=false"])))
    assert untied["head.weight"].shape == (32, 64)
    assert list(axes(model)) == list(decays(model)) == list(params)


@pytest.mark.parametrize("declared", [{}, {"axes": ("embde", None)}])
def test_a_weight_without_known_axes_is_refused_by_name(declared):
    module = nnx.Module()
    module.scale = nnx.Param(jnp.ones((2, 2)), **declared)
    for read in (axes, decays):
        with pytest.raises(ModelError, match="The weight scale has the axes "):
            read(module)


def test_binding_other_names_is_refused(model):
    params = parameters(model)
    params["blocks.9.mixer.qkv.weight"] = params.pop("norm.weight")
    with pytest.raises(ModelError, match="1 are missing .*norm.weight"):
        bind(model, params)


def test_an_attention_only_model_declares_its_limit():
    full = lm.Config(vocab=8, d_model=16, pattern=(attention.Config(max_length=32), gla.Config()))
    assert build(full).max_length == 32
    assert build().max_length is None


def test_the_table_adds_up(model):
    rows = table(model)
    assert sum(row["parameters"] for row in rows) == parameter_count(model)
    assert sum(row["state_bytes"] for row in rows) == state_bytes(model)
    state = model.init_state(3)
    assert sum(a.nbytes for a in jax.tree.leaves(state)) == 3 * state_bytes(model)


def test_a_config_survives_json():
    assert settings.read(lm.Config, settings.plain(CONFIG)) == CONFIG


@pytest.mark.parametrize(
    "change,message",
    [
        ("d_model=33", "does not divide into 4 heads"),
        ("d_model=0", "d_model must be at least 1"),
        ("pattern=[]", "at least one mixer"),
        ('pattern=[{"mixer": "glaa"}]', "did you mean 'gla'"),
        ("pattern.0.head=2", "did you mean 'heads'"),
    ],
)
def test_a_wrong_config_is_one_sentence(change, message):
    with pytest.raises(ConfigError, match=message):
        build(settings.override(CONFIG, [change]))


def test_grouped_norm_and_swiglu_are_their_equations():
    x = jax.random.normal(jax.random.key(0), (2, 3, 8))
    layer = ffn.Config(ratio=2.0, multiple_of=1).build(8, rngs=nnx.Rngs(0))
    gate, up, down = (np.asarray(w.weight[...]) for w in (layer.gate, layer.up, layer.down))
    hidden = np.asarray(x) @ gate
    expected = (hidden / (1 + np.exp(-hidden)) * (np.asarray(x) @ up)) @ down
    assert_close(layer(x), expected.astype(np.float32))


class Counting(Mixer):
    """Adds up tokens, and what travels beside them: the least mixer that shares."""

    shares = True

    def init_state(self, batch):
        return (jnp.zeros((batch, 1), jnp.float32),)

    def mix(self, x, state, reset, shared=None):
        del reset
        return shared, (state[0] + x.shape[1],), 2 * shared


@dataclasses.dataclass(frozen=True)
class CountingConfig:
    def build(self, d_model, *, rngs):
        del d_model, rngs
        return Counting()


def test_what_blocks_share_travels_through_all_of_them():
    config = lm.Config(
        vocab=7,
        d_model=4,
        pattern=(CountingConfig(),),
        repeats=2,
        ffn=None,
        before=(CountingConfig(),),
        dtype="float32",
    )
    model = config.build(rngs=nnx.Rngs(0))
    tokens = jnp.arange(3)[None]
    x, state = run_hidden(model, tokens)
    embedded = model.embed.weight[...][tokens]
    np.testing.assert_allclose(x, model.norm((1 + 1 + 2 + 4) * embedded), rtol=1e-6)
    assert jax.tree.map(jnp.shape, state[0].mixer) == ((1, 1, 1),)
    assert jax.tree.map(jnp.shape, state[1].mixer) == ((2, 1, 1),)


@jax.jit
def run_hidden(model, tokens):
    return model.hidden(tokens)


FFN, OTHER = ffn.Config(ratio=1.0), ffn.Config(ratio=1.0, activation="relu2", gated=False)


@pytest.mark.parametrize(
    "join, expected",
    [
        (Join(), lambda x, n, f: x + f(n(x))),
        (Join(place="after"), lambda x, n, f: x + n(f(x))),
        (Join(place="both"), lambda x, n, f: x + n(f(n(x)))),
        (Join(on_normed=True, keep=0.5, scale=3.0), lambda x, n, f: 0.5 * n(x) + 3 * f(n(x))),
    ],
)
def test_a_layer_joins_the_stream_as_its_config_says(join, expected):
    block = Block(blocks.Config(ffn=FFN, join=join), 8, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 3, 8))
    y, _, _ = block(x, block.init_state(1), jnp.zeros((1, 3), bool))
    np.testing.assert_allclose(y, expected(x, block.ffn_norm, block.ffn), rtol=1e-5, atol=1e-6)


def test_two_mixers_side_by_side_read_the_same_and_add_up():
    both = blocks.Config(
        mixer=gla.Config(), beside=mamba2.Config(), gain=(2.0, 3.0), beside_gain=(0.5, 0.25)
    )
    block = Block(both, 32, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 5, 32))

    @jax.jit
    def actual_and_expected(block, x):
        read = block.mixer_norm(x)
        apart = x + 3 * block.mixer(2 * read)[0] + 0.25 * block.beside(0.5 * read)[0]
        return block(x, block.init_state(1), jnp.zeros((1, 5), bool)), apart

    (y, state, _), expected = actual_and_expected(block, x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert state.mixer is not None and state.beside is not None and state.ffn is None


def test_a_channel_mixer_may_have_a_state():
    config = lm.Config(
        vocab=64, d_model=32, pattern=(gla.Config(),), ffn=gla.Config(heads=2), dtype="float32"
    )
    tokens = jnp.arange(12)[None]
    model = build(config)
    expected, last = run(model, tokens)
    _, state = run(model, tokens[:, :5])
    rest, state = run(model, tokens[:, 5:], state)
    assert_close(rest, expected[:, 5:], GRADIENT)
    assert_close(state, last, GRADIENT)
    assert last[0].ffn.memory.shape[:3] == (1, 1, 2)


def test_blocks_before_and_after_the_pattern_and_bent_logits_survive_json():
    config = settings.override(CONFIG, ["logit_cap=2", "embed_scale=4", "repeats=1"])
    config = dataclasses.replace(
        config,
        pattern=(gla.Config(),),
        before=(blocks.Config(ffn=OTHER), attention.Config(window=4)),
        after=(blocks.Config(mixer=mamba2.Config(), ffn=FFN, join=Join(place="both")),),
        embed_norm=norm.Config("layer"),
    )
    assert settings.read(lm.Config, json.loads(json.dumps(settings.plain(config)))) == config
    model = build(config)
    logits, state = run(model, jnp.arange(9)[None])
    assert logits.shape == (1, 9, 64) and float(jnp.abs(logits).max()) < 2
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, model.init_state(1))
    assert [row["mixer"] for row in table(model)][1:-1] == [
        "ffn",
        "attention + ffn",
        "gla + ffn",
        "mamba2 + ffn",
    ]
    assert sum(row["parameters"] for row in table(model)) == parameter_count(model)


def test_periods_laid_one_by_one_are_the_same_model():
    edge = mamba2.Config()
    config = dataclasses.replace(CONFIG, pattern=PATTERN, repeats=3, before=(edge,), after=(edge,))
    model, tokens = build(config), jnp.arange(10).reshape(2, 5)

    @jax.jit
    def one_by_one(model, tokens, state):
        flat, state = depth.unstacked(model, state)
        logits, state = flat(tokens, state)
        return logits, depth.stacked(model, state)

    _, state = run(model, tokens)
    expected = run(model, tokens, state)
    got = one_by_one(model, tokens, state)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    assert_close(got, expected, GRADIENT)


def test_a_block_without_layers_is_refused():
    with pytest.raises(ConfigError, match="A block needs a mixer, or an ffn alone"):
        blocks.Config()
    with pytest.raises(ConfigError, match="There is no ffn 'mpl': did you mean 'mlp'"):
        settings.override(CONFIG, ['ffn={"ffn": "mpl"}'])
