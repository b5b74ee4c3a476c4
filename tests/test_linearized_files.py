"""Linearized models as files: their family's names, every weight to the bit, nothing mistaken."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import seqlab
from seqlab.errors import ConfigError, ModelError
from seqlab.linearize.presets import PRESETS
from seqlab.linearize.swap import swap
from seqlab.models import decoder, hf_config, pretrained, tensors
from seqlab.models.convert import convert
from seqlab.models.families import llama as llama_family
from seqlab.models.parameters import bind, decays, parameters
from tests.hf_folders import CONFIG, bits, llama, write

GPT = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT2 = GPT | {"model_type": "gpt2", "max_position_embeddings": 32, "tie_word_embeddings": True}
NEOX = GPT | {
    "model_type": "gpt_neox",
    "architectures": ["GPTNeoXForCausalLM"],
    "intermediate_size": 24,
    "tie_word_embeddings": False,
}


def student(raw: dict, mixer, keep=()) -> seqlab.LM:
    """Random weights for the model of a config.json, with a mixer in the place of attention in all
    layers but those kept. Its matrices are bfloat16, those of mixers float32."""
    family = pretrained.family_of(raw["model_type"], "x")
    original = family.config(hf_config.normalised(raw), decoder.UNREAD)
    blocks = [
        dataclasses.replace(block, mixer=mixer) if block.ffn and n not in keep else block
        for n, (_, _, block) in enumerate(decoder.places(original))
    ]
    before, pattern, repeats, after = decoder.fold(blocks)
    lies = {"before": before, "pattern": pattern, "repeats": repeats, "after": after}
    config = dataclasses.replace(original, **lies, published=json.dumps(raw))
    return random(config)


def random(config: seqlab.LMConfig) -> seqlab.LM:
    skeleton, rng = config.skeleton(), np.random.default_rng(0)
    narrow = {name for name, decayed in decays(skeleton).items() if decayed and "mix" not in name}
    dtype = lambda name: jnp.bfloat16 if name in narrow else jnp.float32
    arrays = {n: rng.normal(size=a.shape) / 4 for n, a in parameters(skeleton).items()}
    return bind(skeleton, {n: jnp.asarray(a, dtype(n)) for n, a in arrays.items()})


def same(one: seqlab.LM, two: seqlab.LM) -> bool:
    ours = lambda model: dataclasses.replace(model.config, published=None)
    return ours(one) == ours(two) and bits(parameters(one)) == bits(parameters(two))


def in_layer(folder, layer: str) -> set[str]:
    """The names within a layer."""
    return {n.removeprefix(layer) for n in tensors.read(folder) if n.startswith(layer)}


WINDOW = seqlab.mixer_config("attention", heads=2, kv_heads=1, window=4, sinks=1)
GLA = seqlab.mixer_config("gla", heads=2, conv_width=0)
LINEAR = seqlab.mixer_config("linear_attention", heads=2)
DELTA = seqlab.mixer_config("gated_delta_net")
FEATURES = {f"feature_map_{x}.weight": (2, 8, 8) for x in "qk"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A student of which layer 0 has kept its attention, and its folder."""
    model = student(CONFIG, GLA, keep=[0])
    return model, seqlab.export_hf(model, tmp_path_factory.mktemp("linearized") / "gla")


def test_what_a_window_alone_changes_has_exactly_the_tensors_of_its_family(tmp_path):
    model = student(CONFIG, WINDOW)
    folder = seqlab.export_hf(model, tmp_path / "x")
    theirs = {name: array.shape for name, array in tensors.read(folder).items()}
    assert theirs == {name: array.shape for name, array in llama().items()}
    assert same(seqlab.load(folder), model)


def test_a_kept_layer_has_its_family_s_names_and_a_replaced_one_those_of_its_mixer(exported):
    model, folder = exported
    kept, replaced = (in_layer(folder, f"model.layers.{n}.") for n in range(2))
    assert kept == {n.removeprefix("model.layers.0.") for n in llama() if ".0." in n}
    own = {name for name in replaced if name.startswith("self_attn.")} - {"self_attn.o_proj.weight"}
    inner = [n.removeprefix("blocks.1.mixer.") for n in parameters(model) if "1.mixer." in n]
    assert own == {f"self_attn.{name}" for name in inner if name != "out.weight"}
    assert same(seqlab.load(folder), model)


@pytest.mark.parametrize(
    ("raw", "mixer", "layer", "names"),
    [
        (CONFIG, LINEAR, "model.layers.1.", {"self_attn.q_proj.weight", "self_attn.k.weight"}),
        (NEOX, LINEAR, "gpt_neox.layers.1.", {"attention.query_key_value.weight"}),
        (GPT2, DELTA, "transformer.h.0.", {"self_attn.qkv.weight", "self_attn.A_log"}),
    ],
)
def test_other_families_and_layouts_come_back_to_the_bit(raw, mixer, layer, names, tmp_path):
    model = student(raw, mixer)
    folder = seqlab.export_hf(model, tmp_path / "x")
    assert names <= in_layer(folder, layer)
    assert same(seqlab.load(folder), model)


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("liger", {}),
        ("lizard", {**FEATURES, "alpha": (), "sink": (4,), "gate.weight": (16,), "gate.bias": ()}),
        ("lolcats", {**FEATURES, "window_factor": (2,)}),
    ],
)
def test_what_a_published_method_adds_has_names_of_its_own(method, names, tmp_path):
    attention = seqlab.mixer_config("attention", heads=2, kv_heads=1, head_dim=8)
    model = student(CONFIG, PRESETS[method](attention))
    folder = seqlab.export_hf(model, tmp_path / method)
    prefix = "model.layers.1.self_attn."
    held = {n.removeprefix(prefix): a.shape for n, a in tensors.read(folder).items() if prefix in n}
    assert {n: shape for n, shape in held.items() if "_proj" not in n} == names
    assert same(seqlab.load(folder), model)


def test_what_is_loaded_computes_the_same_to_the_bit(exported):
    model, folder = exported
    tokens = jnp.arange(12).reshape(2, 6) * 7
    run = jax.jit(lambda model: model(tokens)[0])
    assert (run(seqlab.load(folder)) == run(model)).all()


def test_shards_and_a_saved_model_between_are_the_same_file(exported, tmp_path):
    model, folder = exported
    raw = json.loads((folder / "config.json").read_text())
    shards = write(tmp_path / "shards", raw, tensors.read(folder), shard=2000)
    assert (shards / tensors.INDEX).is_file() and same(seqlab.load(shards), model)
    convert(shards, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    assert same(seqlab.load(tmp_path / "ours"), model)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == raw
    assert bits(tensors.read(tmp_path / "back")) == bits(tensors.read(folder))


def test_nobody_takes_it_for_the_model_it_was_made_of(exported):
    raw = json.loads((exported[1] / "config.json").read_text())
    assert raw["model_type"] == "seqlab_linearized" and "auto_map" not in raw
    assert raw["architectures"] == ["SeqlabLinearizedForCausalLM"]
    assert raw["seqlab"]["base"] == {"model_type": "llama"}
    assert {n: raw[n] for n in CONFIG if n not in ("model_type", "torch_dtype")} == {
        n: value for n, value in CONFIG.items() if n not in ("model_type", "torch_dtype")
    }


def test_max_length_is_that_of_the_attention_which_was_kept(exported):
    assert seqlab.load(exported[1]).max_length == 64
    assert seqlab.load(exported[1], max_length=99).max_length == 99


def test_max_length_chooses_how_all_layers_turn_where_it_does_in_the_family(tmp_path):
    stated = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    raw = CONFIG | {"rope_scaling": stated, "original_max_position_embeddings": 32}
    attention = llama_family.mixer(hf_config.normalised(raw))
    folder = seqlab.export_hf(student(raw, PRESETS["liger"](attention), keep=[0]), tmp_path / "x")
    model = seqlab.load(folder, max_length=16)
    assert [one.mixer.rope_scaling.max_length for one in model.config.pattern] == [16, 16]


def test_the_student_of_a_teacher_of_ours_has_a_family_too(tmp_path):
    attention = seqlab.mixer_config("attention", heads=2, kv_heads=1)
    config = seqlab.LMConfig(vocab=97, d_model=16, pattern=(attention,), repeats=2)
    made = swap(random(config), PRESETS["liger"], keep=[1], rngs=nnx.Rngs(0)).student
    folder = seqlab.export_hf(made, tmp_path / "x")
    assert (
        json.loads((folder / "config.json").read_text())["seqlab"]["base"]["model_type"] == "llama"
    )
    assert same(seqlab.load(folder), made)


UP = "model.layers.1.mlp.up_proj.weight"
DECAY = "model.layers.1.self_attn.decay_up.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw, held: held.pop(UP), f"lacks 1 tensors .'{UP}'."),
        (lambda raw, held: held.pop(DECAY), f"lacks 1 tensors .'{DECAY}'."),
        (lambda raw, held: held.update(odd=held[UP]), "has 1 that have no place .'odd'."),
        (lambda raw, held: held.update({DECAY: held[UP]}), f"{DECAY} of shape .* does not become"),
        (lambda raw, held: raw.pop("seqlab"), "lacks 'seqlab' with base and model"),
        (lambda raw, held: raw.update(seqlab=["x"]), "lacks 'seqlab' with base and model"),
        (lambda raw, held: raw["seqlab"].update(model=3), "lacks 'seqlab' with base and model"),
        (lambda raw, held: raw["seqlab"]["model"].pop("vocab"), "seqlab.model .* lacks .*'vocab'"),
        (lambda raw, held: raw["seqlab"]["model"].update(x=1), "seqlab.model .* no field 'x'"),
        (
            lambda raw, held: raw["seqlab"]["model"]["pattern"][1]["mixer"].update(mixer="gal"),
            "There is no mixer 'gal'.* did you mean 'gla'",
        ),
        (lambda raw, held: raw["seqlab"]["model"].update(repeats=2), "of 2 layers, and .* of 4"),
        (lambda raw, held: raw["seqlab"]["base"].clear(), "no model of type None"),
        (
            lambda raw, held: raw["seqlab"]["base"].update(model_type="seqlab_linearized"),
            "lacks 'seqlab'",
        ),
        (lambda raw, held: raw.pop("num_attention_heads"), "lacks 'num_attention_heads'"),
    ],
)
def test_a_damaged_file_is_refused_in_one_sentence(exported, change, message, tmp_path):
    raw = json.loads((exported[1] / "config.json").read_text())
    held = tensors.read(exported[1])
    change(raw, held)
    with pytest.raises((ModelError, ConfigError), match=message) as caught:
        seqlab.load(write(tmp_path / "x", raw, held))
    assert "\n" not in str(caught.value)
