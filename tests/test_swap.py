"""Swapping attention for other mixers: what is shared, what is carried over, what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqlab.errors import ConfigError, ModelError
from seqlab.layers import norm
from seqlab.layers.linear import Linear
from seqlab.layers.mixer import Mixer
from seqlab.layers.mixers import attention
from seqlab.layers.registry import mixer_config
from seqlab.linearize import carry
from seqlab.linearize.fit import fit
from seqlab.linearize.presets import PRESETS
from seqlab.linearize.swap import Pair, plan, swap
from seqlab.models import decoder, layout, lm
from seqlab.models.parameters import parameters

T = 24
ATTENTION = attention.Config(heads=4, kv_heads=2, head_dim=8, max_length=T)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, T)))
MAMBA2 = mixer_config("mamba2", heads=4, head_dim=8, d_state=8, groups=4)


def model(*pattern, repeats=1, **fields) -> lm.LM:
    config = lm.Config(vocab=31, d_model=32, pattern=pattern, repeats=repeats, **fields)
    return config.build(rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def teacher() -> lm.LM:
    return model(ATTENTION, repeats=4)


def windowed(window: int):
    return lambda a: dataclasses.replace(a, window=window)


def swapped(teacher, target, **fields) -> Pair:
    return swap(teacher, target, rngs=nnx.Rngs(1), **fields)


@jax.jit
def logits(model, tokens):
    return model(tokens)[0]


def test_a_window_as_long_as_the_text_is_the_teacher(teacher):
    pair = swapped(teacher, windowed(T))
    assert (logits(pair.student, TOKENS) == logits(teacher, TOKENS)).all()
    narrow = swapped(teacher, windowed(4))
    assert (logits(narrow.student, TOKENS) != logits(teacher, TOKENS)).any()


def test_where_no_stack_comes_apart_every_carried_weight_is_the_same_buffer(teacher):
    pair = swapped(teacher, windowed(T))
    ours, theirs = parameters(pair.student), parameters(teacher)
    assert pair.teacher is teacher and pair.extra == pair.left == frozenset()
    assert ours.keys() == theirs.keys() and all(ours[name] is theirs[name] for name in theirs)


@pytest.mark.parametrize(
    ("keep", "repeats"), [({0}, 3), ({1}, 2), ({1, 3}, 2), ({3}, 3), ({0, 2, 3}, 2)]
)
def test_a_stack_with_kept_layers_comes_apart_once_for_both(teacher, keep, repeats):
    pair = swapped(teacher, windowed(T), keep=keep)
    assert pair.replaced == tuple(sorted({0, 1, 2, 3} - keep))
    mixers = [block.mixer for block in layout.layers(pair.student.config)]
    windows = [getattr(mixer, "window", "") for mixer in mixers]
    assert windows == [None if n in keep else T for n in range(4)]
    assert pair.teacher.config.repeats == pair.student.config.repeats == repeats
    ours, theirs = parameters(pair.student), parameters(pair.teacher)
    assert all(ours[name] is theirs[name] for name in theirs)
    untouched = [name for name in parameters(teacher) if not name.startswith("blocks.")]
    assert all(theirs[name] is parameters(teacher)[name] for name in untouched)
    layer = lambda model, n: layer_of(model, n)["mixer.q.weight"]
    assert all((layer(teacher, n) == layer(pair.teacher, n)).all() for n in range(4))


def layer_of(model: lm.LM, n: int) -> dict[str, jax.Array]:
    prefix, repeat, _ = decoder.places(model.config)[n]
    inside = {k: a for k, a in parameters(model).items() if k.startswith(prefix)}
    take = lambda a: a if repeat is None else a[repeat]
    return {name.removeprefix(prefix): take(a) for name, a in inside.items()}


def test_a_model_laid_out_anew_is_the_same_model(teacher):
    pair = swapped(teacher, windowed(T), keep={1})
    assert (logits(pair.teacher, TOKENS) == logits(teacher, TOKENS)).all()


def test_layers_with_a_window_of_their_own_or_without_attention_stay():
    sliding = dataclasses.replace(ATTENTION, window=5)
    gla = mixer_config("gla")
    hybrid = model(sliding, ATTENTION, gla, repeats=2)
    pair = swapped(hybrid, windowed(9))
    assert pair.replaced == (1, 4) and pair.teacher is hybrid
    assert [e.mixer for e in pair.student.config.pattern] == [sliding, windowed(9)(ATTENTION), gla]


def test_mamba_2_takes_over_every_entry_of_the_projections(teacher):
    pair = swapped(teacher, lambda _: MAMBA2)
    ours, theirs = parameters(pair.student), parameters(teacher)
    mixer = lambda held, name: held[f"blocks.0.mixer.{name}.weight"]
    q, k, v = (np.asarray(mixer(theirs, name)) for name in "qkv")
    repeated = lambda a: np.repeat(a.reshape(4, 32, 2, 8), 2, 2).reshape(4, 32, 32)
    expected = np.concatenate([repeated(v), repeated(k), q], -1)
    assert (np.asarray(mixer(ours, "xbc")) == expected).all()
    assert mixer(ours, "out") is mixer(theirs, "out")
    new = {"z.weight", "dt.weight", "dt_bias", "A_log", "D", "conv.weight", "conv.bias"}
    assert pair.extra == {f"blocks.0.mixer.{name}" for name in {*new, "norm.weight"}}
    assert all(ours[name].dtype == jnp.float32 for name in pair.extra)


def test_heads_that_lie_interleaved_are_carried_head_by_head(teacher):
    pair = swapped(teacher, lambda _: mixer_config("lightning", heads=4, head_dim=8))
    qkv = parameters(pair.student)["blocks.0.mixer.qkv.weight"].reshape(4, 32, 4, 3, 8)
    theirs = parameters(teacher)
    q, k = (theirs[f"blocks.0.mixer.{n}.weight"].reshape(4, 32, -1, 8) for n in "qk")
    assert (qkv[:, :, :, 0] == q).all() and (qkv[:, :, 3, 1] == k[:, :, 1]).all()


def test_the_same_seed_draws_the_same_new_weights(teacher):
    draw = lambda seed: parameters(swap(teacher, lambda _: MAMBA2, rngs=nnx.Rngs(seed)).student)
    one, again, other = draw(1), draw(1), draw(2)
    name = "blocks.0.mixer.z.weight"
    assert (one[name] == again[name]).all() and (one[name] != other[name]).any()


def test_norms_of_queries_and_biases_go_where_there_is_room_for_them():
    teacher = model(dataclasses.replace(ATTENTION, qk_norm=norm.Config(), qkv_bias=True))
    stays = swapped(teacher, windowed(4))
    assert stays.left == frozenset()
    ours, theirs = parameters(stays.student), parameters(teacher)
    assert all(ours[name] is theirs[name] for name in theirs)
    plain = swapped(teacher, lambda _: MAMBA2)
    inside = {f"{n}.bias" for n in "qkv"} | {"q_norm.weight", "k_norm.weight"}
    assert plain.left == {f"blocks.0.mixer.{name}" for name in inside}


def test_bfloat16_stays_bfloat16_and_what_is_new_is_float32(teacher):
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), teacher)
    pair = swapped(narrow, lambda _: MAMBA2, keep={0})
    for name, array in parameters(pair.student).items():
        assert array.dtype == (jnp.float32 if name in pair.extra else jnp.bfloat16), name


QKV = {"qkv": "q:1 k:2 v:2", "out": "out"}
#: Which maps of a mixer take over what, and how often each head stands: once where it is as it was.
CARRIED = {
    "aaren": {"k": "k:2", "v": "v:2", "out": "out"},
    "attention": {"q": "q", "k": "k", "v": "v", "out": "out"},
    "delta_net": QKV,
    "gated_delta_net": QKV,
    "gla": QKV,
    "hgrn2": {"q": "q", "v": "v:2", "out": "out"},
    "kda": QKV,
    "lightning": {"qkv": " ".join(["q:1 k:2 v:2"] * 4), "out": "out"},
    "linear_attention": {"q": "q", "k": "k", "v": "v", "out": "out"},
    "mamba": {"u": "v:2", "out": "out"},
    "mamba2": {"xbc": "v:2 k:2 q:1", "out": "out"},
    "mlstm": {"q": "q", "k": "k:2", "v": "v:2", "out": "out"},
    "retnet": QKV,
    "rwkv6": {"r": "q", "k": "k:2", "v": "v:2", "out": "out"},
    "rwkv7": {"r": "q", "k": "k:2", "v": "v:2", "out": "out"},
    "s5": {},
    "lstm": {},
}


@pytest.mark.parametrize("name", CARRIED)
def test_a_mixer_fitted_to_the_attention_takes_over_what_it_can(teacher, name):
    narrow = windowed(5) if name == "attention" else lambda config: config
    carried = plan(teacher.config, lambda a: narrow(fit(name, a, 32))).carried
    inside = {at.removeprefix("blocks.0.mixer."): source for at, source in carried.items()}
    told = {at.removesuffix(".weight"): tell(source) for at, source in inside.items()}
    assert told == CARRIED[name]
    for source in inside.values():
        assert source.axis is None or sum((p.end or 0) - p.begin for p in source.parts) % 32 == 0


def tell(source) -> str:
    roles = [part.name.split(".")[-2] for part in source.parts]
    times = ["" if source.axis is None else f":{part.times}" for part in source.parts]
    return " ".join(role + n for role, n in zip(roles, times, strict=True))


@pytest.mark.parametrize(("width", "d_model"), [(48, 32), (4096, 3072), (1920, 2560), (29, 100)])
def test_widths_are_those_of_the_attention_whatever_the_ratio(width, d_model):
    wide = dataclasses.replace(ATTENTION, heads=1, kv_heads=1, head_dim=width)
    config = fit("gla", wide, d_model)
    assert int(d_model * config.expand_k) == int(d_model * config.expand_v) == width


def test_what_a_mixer_shares_with_attention_is_as_it_was():
    attention = dataclasses.replace(ATTENTION, rope_base=5e5, qkv_bias=True, scale=0.3)
    assert fit("retnet", attention, 32).rope_base == 5e5
    assert fit("mamba2", attention, 32).bias and not fit("mamba2", ATTENTION, 32).bias
    assert fit("linear_attention", attention, 32).scale is False


class Own(Mixer):
    """A user's mixer, which says how wide its parts are, and may be wrong."""

    projections = {"both": (("k", 32), ("v", 16))}

    def __init__(self):
        self.both = Linear(32, 64, ("embed", "heads"), rngs=nnx.Rngs(0))


def test_a_mixer_that_miscounts_its_projections_is_told_so():
    with pytest.raises(ModelError, match="own says of its both, which is 64 wide, that it is made"):
        carry.sources(ATTENTION.build(32, rngs=nnx.Rngs(0)), Own(), "own")


@pytest.mark.parametrize(
    ("target", "keep", "error", "says"),
    [
        (lambda a: MAMBA2, {7}, ConfigError, "There is no layer 7 to keep: the model has 4"),
        (lambda a: MAMBA2, {0, 1, 2, 3}, ConfigError, "All 4 layers .* keep fewer"),
        (
            lambda a: dataclasses.replace(MAMBA2, d_state=4),
            (),
            ModelError,
            "mamba2 cannot take over the teacher's q of 4 heads of 8, which is 32 wide: its xbc "
            "has 16 for it and needs 32, so give it other fields or take another mixer.",
        ),
        (
            lambda a: mixer_config("gated_delta_net", key_heads=1, value_heads=4, value_dim=8),
            (),
            ModelError,
            "teacher's q of 4 heads of 8, which is 32 wide: its qkv has 16",
        ),
    ],
)
def test_what_cannot_be_swapped_is_said_in_a_sentence(teacher, target, keep, error, says):
    with pytest.raises(error, match=says):
        plan(teacher.config, target, keep=keep)


def test_a_model_without_full_attention_has_nothing_to_swap():
    with pytest.raises(ModelError, match="no layer of full softmax attention"):
        plan(model(mixer_config("gla")).config, windowed(4))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_takes_over_all_of_the_attention_as_it_is(name):
    attention = dataclasses.replace(ATTENTION, qk_norm=norm.Config(), qkv_bias=True)
    teacher = lm.Config(vocab=31, d_model=32, pattern=(attention,), repeats=2)
    made = plan(teacher, PRESETS[name])
    assert all(source.axis is None for source in made.carried.values())
    old, new = (parameters(config.skeleton()) for config in (made.teacher, made.student))
    assert made.left == frozenset() and made.extra == new.keys() - old.keys()
