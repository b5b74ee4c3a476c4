"""GPT-2, GPT-NeoX and Phi compute what transformers computes, and are exported to the bit."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

import seqlab
from seqlab.errors import ConfigError, ModelError
from seqlab.layers import ffn
from seqlab.linearize.presets import PRESETS
from seqlab.linearize.swap import swap
from seqlab.models import block, decoder, hf_config, tensors
from seqlab.models.block import Join
from seqlab.models.families import gpt_neox, phi
from seqlab.models.parameters import parameters
from tests.hf_folders import bits, write
from tests.hf_models import TINY, build, hold

GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
GPT_NEOX = {name: value for name, value in TINY.items() if name != "num_key_value_heads"}
CASES = {
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**GPT_NEOX),
    "gpt_neox, one after the other": lambda: transformers.GPTNeoXConfig(
        **GPT_NEOX, use_parallel_residual=False, attention_bias=False, rotary_pct=0.5
    ),
    "phi": lambda: transformers.PhiConfig(**TINY, qk_layernorm=True),
}


@torch.no_grad()
def heat_embedding(model):
    """It is called otherwise in GPT-2 than in other models."""
    if hasattr(model, "transformer"):
        model.transformer.wte.weight.mul_(0.4 * 32**0.5)


@pytest.mark.parametrize("name", CASES)
def test_gpt_and_its_kin_are_those_of_transformers(name, tmp_path):
    model = hold(CASES[name](), tmp_path, heat_embedding)
    assert len(model.blocks) == 1


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A folder of GPT-2 as transformers writes it today."""
    folder = tmp_path_factory.mktemp("gpt") / "theirs"
    build(CASES["gpt2"](), folder)
    return folder


def test_the_oldest_files_of_gpt2_name_nothing_of_the_whole(gpt2, tmp_path):
    """They hold masks, and do not say that weights are tied: so lies gpt2 itself on the hub."""
    config = json.loads((gpt2 / "config.json").read_text())
    old = {name: value for name, value in config.items() if name != "tie_word_embeddings"}
    bare = {n.removeprefix("transformer."): array for n, array in tensors.read(gpt2).items()}
    masks = {"h.0.attn.bias": np.ones((1, 1, 64, 64), "f4"), "h.0.attn.masked_bias": np.float32(-1)}
    model = seqlab.load(write(tmp_path / "old", old, bare | masks))
    assert model.head is None
    assert bits(parameters(model)) == bits(parameters(seqlab.load(gpt2)))


def test_gpt2_may_leave_scores_unscaled_or_scale_them_by_layer(gpt2, tmp_path):
    config = json.loads((gpt2 / "config.json").read_text())
    changes = {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}
    model = seqlab.load(write(tmp_path / "scaled", config | changes, tensors.read(gpt2)))
    assert [one.mixer.scale for one in model.config.pattern] == [1.0, 1 / 2, 1 / 3]


def test_transformers_does_not_take_a_linearized_model_for_what_it_was(gpt2, tmp_path):
    student = swap(seqlab.load(gpt2), PRESETS["liger"], rngs=nnx.Rngs(0)).student
    folder = seqlab.export_hf(student, tmp_path / "student")
    assert tensors.read(folder).keys() == tensors.read(gpt2).keys()
    with pytest.raises(ValueError, match="seqlab_linearized"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(("family", "fraction"), [(gpt_neox, 0.25), (phi, 0.5)])
def test_where_a_file_does_not_say_how_much_of_a_head_turns_its_family_does(family, fraction):
    fields = hf_config.normalised(TINY | {"hidden_act": "gelu", "tie_word_embeddings": False})
    assert family.config(fields, decoder.UNREAD).pattern[0].mixer.rope_fraction == fraction


def test_a_document_longer_than_the_table_of_positions_is_refused_or_nan_from_there_on():
    config = seqlab.mixer_config("learned_positions", max_length=4)
    mixer, x = config.build(8, rngs=nnx.Rngs(0)), jnp.zeros((2, 3, 8))
    _, state = mixer(x)
    with pytest.raises(ModelError, match="positions with max_length=4 cannot hold 6 tokens"):
        mixer(x, state)
    reset = jnp.zeros((2, 3), bool).at[1, 1].set(True)
    y, _ = jax.jit(mixer.__call__)(x, state, reset=reset)
    assert jnp.isnan(y).all(-1).tolist() == [[False, True, True], [False] * 3]
    assert (y[1, 1:] == mixer.table[:2]).all()


@pytest.mark.parametrize(
    "changes",
    [{"mixer": None}, {"ffn": None}, {"join": Join(place="after")}, {"ffn_join": Join()}],
)
def test_layers_side_by_side_are_two_and_joined_in_the_usual_way(changes):
    one = block.Config(mixer=seqlab.mixer_config("gla"), ffn=ffn.Config(), parallel="own_norm")
    with pytest.raises(ConfigError, match="parallel='own_norm' is of a mixer and an ffn"):
        dataclasses.replace(one, **changes)


def test_a_tied_head_has_no_bias():
    with pytest.raises(ConfigError, match="set tie_embeddings=False"):
        seqlab.LMConfig(vocab=9, d_model=8, pattern=(seqlab.mixer_config("gla"),), head_bias=True)
