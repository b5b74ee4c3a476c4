"""Gemma, SmolLM3 and Phi-3 compute what transformers computes, and are exported to the bit."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import seqlab
from seqlab.errors import ConfigError, ModelError
from seqlab.models import hf_config, pretrained
from seqlab.models.parameters import bind, parameters
from tests.hf_folders import bits
from tests.hf_models import TINY, heat, hold

SMALL = {**TINY, "num_hidden_layers": 2, "pad_token_id": 0}
GEMMA = {**SMALL, "head_dim": 12}
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.3, 1.7],
    "long_factor": [1.0, 4.0, 9.0],
    "original_max_position_embeddings": 32,
}

CASES = {
    "gemma": lambda: transformers.GemmaConfig(**GEMMA, hidden_act="gelu"),
    "gemma2": lambda: transformers.Gemma2Config(
        **GEMMA,
        sliding_window=7,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=15.0,
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **GEMMA | {"num_hidden_layers": 4},
        sliding_window=7,
        sliding_window_pattern=2,
        query_pre_attn_scalar=24,
        rope_parameters=TWO_ROPES,
    ),
    "smollm3, whose layers without positions slide": lambda: transformers.SmolLM3Config(
        **SMALL, no_rope_layer_interval=2, use_sliding_window=True, sliding_window=9
    ),
    "phi3, beyond its trained length": lambda: transformers.Phi3Config(
        **SMALL,
        sliding_window=20,
        original_max_position_embeddings=32,
        rope_parameters=dict(LONGROPE),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_these_families_are_those_of_transformers(name, tmp_path):
    """Now, and as files of transformers 4 spell them; and whatever length is asked for."""
    model = hold(CASES[name](), tmp_path)
    seqlab.export_hf(seqlab.load(tmp_path / "theirs", max_length=20), tmp_path / "shorter")
    assert len(model.before) + len(model.blocks) + len(model.after) <= 2
    shutil.copytree(tmp_path / "theirs", tmp_path / "older")
    config = tmp_path / "older" / "config.json"
    config.write_text(json.dumps(older(json.loads(config.read_text()))))
    assert rotation(tmp_path / "older") == rotation(tmp_path / "theirs")
    assert described(seqlab.load(tmp_path / "older")) == described(model)


def older(raw: dict) -> dict:
    """config.json as transformers 4 wrote it."""
    rope = raw.pop("rope_parameters")
    raw = {n: value for n, value in raw.items() if n not in ("layer_types", "no_rope_layers")}
    if "full_attention" in rope:
        raw["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    raw["torch_dtype"] = raw.pop("dtype")
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["partial_rotary_factor"] = rope.pop("partial_rotary_factor", None)
    spelling = {"default": None, "longrope": {"type": "su"}, "linear": {"rope_type": "linear"}}
    started = spelling[rope.pop("rope_type")]
    raw["rope_scaling"] = started and started | rope
    return raw


def rotation(folder) -> dict:
    """What transformers makes of a folder's rotary embedding."""
    read = transformers.AutoConfig.from_pretrained(folder).rope_parameters
    return {name: value for name, value in read.items() if name != "type"}


def described(model: seqlab.LM) -> dict:
    return {**vars(model.config), "published": None}


@pytest.mark.parametrize("length", [32, 33])
def test_longrope_takes_its_factors_by_the_length_that_is_intended(length):
    """Where transformers takes them by that of the text, whose keys then no longer fit."""
    config = CASES["phi3, beyond its trained length"]()
    frequency, gain = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu", seq_len=length)
    fields = hf_config.normalised(config.to_dict())
    fields.max_length = length
    ours = fields.rope()["rope_scaling"]
    np.testing.assert_allclose(ours.stretch(1e4 ** (-np.arange(3) / 3), 1e4), frequency, rtol=1e-6)
    assert ours.gain == gain and ours.gain > 1


def test_a_gemma_inside_of_a_multimodal_model_is_that_gemma(tmp_path):
    """As transformers saves it, pictures and all, which are left aside."""
    text = CASES["gemma3"]()
    alone = transformers.Gemma3ForCausalLM(text)
    heat(alone)
    alone.save_pretrained(tmp_path / "alone")
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "image_size": 14}
    vision = {**small, "num_attention_heads": 2, "patch_size": 7}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4
    )
    both = transformers.Gemma3ForConditionalGeneration(config)
    both.model.language_model.load_state_dict(alone.model.state_dict())
    both.save_pretrained(tmp_path / "both")
    model, expected = (seqlab.load(tmp_path / name) for name in ("both", "alone"))
    assert described(model) == described(expected)
    assert bits(parameters(model)) == bits(parameters(expected))


@pytest.mark.parametrize(("dtype", "scale"), [("bfloat16", 6.9375), ("float32", 48**0.5)])
def test_the_scale_of_embeddings_is_rounded_as_they_are(dtype, scale):
    mixer = seqlab.mixer_config("attention", heads=2)
    model = seqlab.build(seqlab.LMConfig(3, 48, (mixer,), ffn=None, embed_scale="root"))
    model = bind(model, parameters(model) | {"embed.weight": jnp.ones((3, 48), dtype)})
    assert (model._embed(jnp.zeros((1, 1), int)) == jnp.float32(scale)).all()


@pytest.mark.parametrize(("stated", "window"), [(63, 63), (64, None)])
def test_a_window_that_holds_every_text_is_none(stated, window):
    raw = CASES["phi3, beyond its trained length"]().to_dict() | {"sliding_window": stated}
    layers = {"num_hidden_layers": 6}
    family = pretrained.model_types()["phi3"]
    config = family.config(hf_config.normalised(raw | layers), EMPTY)
    assert config.pattern[0].mixer.window == window


EMPTY = {f"model.layers.{n}.x": np.zeros(1) for n in range(6)}
EMPTY |= {"model.embed_tokens.weight": np.zeros((97, 32))}


@pytest.mark.parametrize("kind", ["gemma", "gemma2", "gemma3_text", "smollm3", "phi3"])
def test_what_files_do_not_say_is_what_transformers_fills_in(kind):
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 6}
    family = pretrained.model_types()[kind]
    config = lambda raw: family.config(hf_config.normalised(raw), EMPTY)
    default = transformers.AutoConfig.for_model(kind, **sizes, tie_word_embeddings=True).to_dict()
    assert config({"model_type": kind, **sizes}) == config(default)
    assert config(default | {"attn_logit_softcapping": None}).pattern[0].mixer.cap is None


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gemma3_text", {"use_bidirectional_attention": True}, "lets tokens see those after them"),
        ("gemma2", {"sliding_window": -1}, "gemma2"),
        ("phi3", {"rope_scaling": LONGROPE | {"long_factor": [1.0]}}, "1 factors for 3 freq"),
        ("phi3", {"rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, "short_factor"),
        ("phi3", {"rope_scaling": {"type": "dynamic"}}, "'dynamic'.*longrope: take a"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(kind, changes, message):
    raw = {**SMALL, "num_hidden_layers": 6, "model_type": kind, **changes}
    family = pretrained.model_types()[kind]
    with pytest.raises((ModelError, ConfigError), match=message) as caught:
        pretrained.config_of(family, hf_config.normalised(raw), EMPTY, "config.json")
    assert "\n" not in str(caught.value)
