"""Published folders: mapped onto meshes, written back to the bit, refused in a sentence."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqlab
from seqlab.errors import CheckpointError, ConfigError, DataError, ModelError
from seqlab.infer.command import generate
from seqlab.models import hf_config, pretrained, tensors, translate
from seqlab.models.convert import convert
from seqlab.models.decoder import fold
from seqlab.models.parameters import parameters
from seqlab.models.rearrange import Joined, join, reshape, rule, split, stack, transpose
from tests.hf_folders import CONFIG, bits, llama, with_tokenizer, write


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "theirs")


def test_matrices_keep_their_dtype_and_vectors_become_float32(folder):
    weights = parameters(seqlab.load(folder))
    theirs = tensors.read(folder)
    assert weights["blocks.0.mixer.q.weight"].dtype == jnp.bfloat16
    assert weights["blocks.0.mixer_norm.weight"].dtype == jnp.float32
    for n in range(2):
        q = theirs[f"model.layers.{n}.self_attn.q_proj.weight"]
        np.testing.assert_array_equal(weights["blocks.0.mixer.q.weight"][n], q.T)
        norm = theirs[f"model.layers.{n}.input_layernorm.weight"]
        np.testing.assert_array_equal(weights["blocks.0.mixer_norm.weight"][n], norm)


def test_shards_and_old_or_nested_spellings_are_the_same_model(folder, tmp_path):
    whole = bits(parameters(seqlab.load(folder)))
    sharded = write(tmp_path / "sharded", shard=2000)
    assert (sharded / tensors.INDEX).is_file() and bits(parameters(seqlab.load(sharded))) == whole

    text = {n: value for n, value in CONFIG.items() if n not in ("rope_theta", "torch_dtype")}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    nested = {"model_type": "wrapped", "text_config": text, "dtype": "bfloat16"}
    wrap = lambda n: n.replace("model.", "model.language_model.", 1)
    arrays = {wrap(n): a for n, a in llama().items()}
    model = seqlab.load(write(tmp_path / "nested", nested, arrays))
    assert bits(parameters(model)) == whole
    ours = lambda model: {**vars(model.config), "published": None}
    assert ours(model) == ours(seqlab.load(folder))


def test_a_folder_of_links_is_read(folder, tmp_path):
    """As the cache of the Hugging Face hub lays out a model."""
    (tmp_path / "snapshot").mkdir()
    for file in folder.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    linked = seqlab.load(tmp_path / "snapshot")
    assert bits(parameters(linked)) == bits(parameters(seqlab.load(folder)))


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QWEN = {"factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        ({}, {"rope_type": "default", "rope_theta": 1e4}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3},
        ),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **QWEN}},
            {"rope_type": "yarn", "rope_theta": 1e6, **QWEN},
        ),
        (
            {"rotary_emb_base": 2e4, "rotary_pct": 0.25, "rope_scaling": None},
            {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.25},
        ),
    ],
)
def test_older_files_spell_rotation_otherwise(older, newer):
    old = hf_config.normalised(older).rope()
    assert old == hf_config.normalised({"rope_parameters": newer}).rope()
    nested = {"rope_parameters": {"sliding_attention": newer, "full_attention": {}}}
    assert hf_config.normalised(nested).rope("sliding_attention") == old
    assert hf_config.normalised(nested).rope()["rope_base"] == 1e4


class Watched:
    """An array that can only be indexed, and notes what was asked of it."""

    def __init__(self, array, asked):
        self.array, self.asked, self.shape, self.dtype = array, asked, array.shape, array.dtype

    def __getitem__(self, index):
        part = self.array[index]
        self.asked.append((self.shape, part.shape))
        return part


def test_on_a_mesh_each_device_reads_its_slice_and_no_more(folder, monkeypatch):
    alone = bits(parameters(seqlab.load(folder)))
    asked: list = []
    read = translate._read
    monkeypatch.setattr(translate, "_read", lambda *a: [Watched(x, asked) for x in read(*a)])
    with seqlab.parallel.use_mesh(data=2, model=4):
        spread = parameters(seqlab.load(folder))
    assert bits(spread) == alone
    q = spread["blocks.0.mixer.q.weight"]  # [2, 16, 16]: embed over data, heads over model
    assert {shard.data.shape for shard in q.addressable_shards} == {(2, 8, 4)}
    assert {part for shape, part in asked if shape == (16, 16)} == {(8, 4), (4, 8)}


def test_what_is_loaded_is_apart_from_its_file(folder, monkeypatch):
    """Files may change, and a mapped array changes with them."""
    handed: list = []
    place = jax.make_array_from_callback
    keep = lambda read: lambda index: handed.append(read(index)) or handed[-1]
    monkeypatch.setattr(
        jax, "make_array_from_callback", lambda shape, where, read: place(shape, where, keep(read))
    )
    seqlab.load(folder)
    assert len(handed) == 12  # one device reads each weight once
    assert not any(isinstance(base, np.memmap) for part in handed for base in bases(part))


def bases(array):
    """The arrays whose memory it is a view of, and itself."""
    while isinstance(array, np.ndarray):
        yield array
        array = array.base


def test_a_model_goes_there_and_back_through_a_saved_model_to_the_bit(tmp_path):
    source = with_tokenizer(write(tmp_path / "theirs"))
    convert(source, tmp_path / "ours", max_length=32)
    model = seqlab.load(tmp_path / "ours")
    assert model.max_length == 32
    convert(tmp_path / "ours", tmp_path / "back")
    with pytest.raises(ModelError, match="back exists: choose another path"):
        convert(tmp_path / "ours", tmp_path / "back")
    kept = {name: value for name, value in CONFIG.items() if name != "torch_dtype"}
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written == {**kept, "dtype": "bfloat16"}
    back = tensors.read(tmp_path / "back")
    assert back.keys() == llama().keys()
    assert all((back[name] == a).all() for name, a in llama().items())
    assert bits(parameters(seqlab.load(tmp_path / "back"))) == bits(parameters(model))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


def test_a_model_that_its_family_cannot_express_is_not_exported(folder, tmp_path):
    model = seqlab.load(folder)
    lm = dataclasses.replace(model.config, logit_cap=3.0)
    changed = jax.tree.unflatten(jax.tree.structure(lm.skeleton()), jax.tree.leaves(model))
    with pytest.raises(ModelError, match="its family cannot express"):
        seqlab.export_hf(changed, tmp_path / "x")
    full = seqlab.mixer_config("attention", heads=2)
    stretched = seqlab.mixer_config(
        "attention", heads=2, rope_scaling={"kind": "linear", "factor": 2}
    )
    for pattern in [(seqlab.mixer_config("gla"),), (stretched,), (full, stretched)]:
        small = seqlab.LMConfig(vocab=9, d_model=8, pattern=pattern)
        with pytest.raises(ModelError, match="No published family can express"):
            seqlab.export_hf(seqlab.build(small), tmp_path / "x")
    with pytest.raises(ModelError, match="exists: choose another path"):
        seqlab.export_hf(model, folder)
    assert not (tmp_path / "x").exists()


UP, HEAD = "model.layers.1.mlp.up_proj.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({n: a for n, a in llama().items() if n != UP}, f"lacks 1 tensors .'{UP}'.: it is not"),
        ({**llama(), "odd": np.ones(2, "f4")}, "has 1 that have no place .'odd'."),
        ({**llama(), "a\n" * 99: np.ones(2, "f4")}, r"no place .'(a\\n)+a?\.\.\.'."),
        ({**llama(), UP: llama()[UP][:-1]}, rf"{UP} of shape \[23, 16\] does not become"),
        ({**llama(), UP: llama()[UP].ravel()}, rf"{UP} of shape \[384\] does not become"),
        ({**llama(), UP: llama()[UP].astype("i1")}, f"{UP} is int8, and weights are float32"),
        ({n: a for n, a in llama().items() if ".1." not in n}, "2 layers and the tensors have 1"),
        ({**llama(), "model.embed_tokens.weight": np.ones((7, 16), "f4")}, "vocab_size=300"),
        ({"x": np.ones(1, "f4")}, "model.embed_tokens.weight is absent"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_refused(tmp_path, arrays, message):
    with pytest.raises(ModelError, match=message) as caught:
        seqlab.load(write(tmp_path / "theirs", arrays=arrays))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "lama"}, "no model of type 'lama'.* known types are .*llama, "),
        ({"model_type": ["x"]}, "no model of type"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized .'gptq'.*bitsandbytes"),
        ({"num_attention_heads": None}, "lacks 'num_attention_heads'"),
        ({"num_attention_heads": "many"}, "does not describe a model of type 'llama'"),
        ({"num_attention_heads": 3}, "does not describe|not divisible"),
        ({"num_attention_heads": 10**30}, "does not describe|not divisible"),
        ({"hidden_act": "snake"}, "hidden_act='snake'.*no activation"),
        ({"hidden_act": {}}, "does not describe"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, "'dynamic'.*default, linear"),
        ({"rope_scaling": {"type": "linear"}}, "does not describe.*KeyError"),
        ({"rope_scaling": [1]}, "rotary parameters"),
        ({"hidden_size": 48}, "hidden_size=48 of config.json: they are of two models"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers and the tensors have 2"),
        ({"tie_word_embeddings": True}, "ties lm_head.weight to the embedding"),
        ({"intermediate_size": 32}, r"\[24, 16\] does not become"),
        ({"attention_bias": True}, "lacks 8 tensors .*q_proj.bias"),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_one_sentence(tmp_path, changes, message):
    with pytest.raises((ModelError, ConfigError), match=message) as caught:
        seqlab.load(write(tmp_path / "theirs", {**CONFIG, **changes}))
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


def test_a_head_that_repeats_a_tied_embedding_is_passed_over(tmp_path):
    same = {**llama(), HEAD: llama()["model.embed_tokens.weight"]}
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, "f4")}
    model = seqlab.load(
        write(tmp_path / "theirs", {**CONFIG, "tie_word_embeddings": True}, same | buffers)
    )
    assert model.head is None


def test_full_attention_holds_what_was_trained_but_4096_at_most(folder, tmp_path):
    assert seqlab.load(folder).max_length == 64
    assert seqlab.load(folder, max_length=8).max_length == 8
    long = write(tmp_path / "long", {**CONFIG, "max_position_embeddings": 10**6})
    assert seqlab.load(long).max_length == 4096
    model = seqlab.build(
        seqlab.LMConfig(vocab=9, d_model=8, pattern=(seqlab.mixer_config("gla"),), ffn=None)
    )
    with pytest.raises(ModelError, match="its own config has the max_length"):
        seqlab.load(seqlab.save(model, tmp_path / "own"), max_length=9)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("aaaa", ("", "a", 4, "")),
        ("abab", ("", "ab", 2, "")),
        ("aababab", ("a", "ab", 3, "")),
        ("xaabaabaaby", ("x", "aab", 3, "y")),
        ("aabaaba", ("", "aab", 2, "a")),
        ("abc", ("", "abc", 1, "")),
        ("a", ("", "a", 1, "")),
    ],
)
def test_layers_fold_into_the_fewest_blocks(layers, expected):
    before, pattern, repeats, after = fold(layers)
    assert ("".join(before), "".join(pattern), repeats, "".join(after)) == expected


def test_every_rearrangement_has_an_inverse():
    r = np.random.default_rng(0)
    array = lambda *shape: r.normal(size=shape)
    for given, steps in [
        ([array(12, 5)], [reshape((12, -1), (2, 6, -1)), split(2, 4, axis=1), transpose(2, 0, 1)]),
        ([array(3, 4), array(3, 2)], [transpose(1, 0), join(4, 2)]),
        ([array(2, 3)] * 3, [transpose(1, 0), stack(3)]),
        ([array(6, 1, 4)], [reshape((6, 1, 4), (6, 4)), transpose(1, 0)]),
    ]:
        one = rule("ours", "theirs", *steps)
        back = one.write([np.asarray(a) for a in one.read(given)])
        assert [a.tolist() for a in back] == [a.tolist() for a in given]
    with pytest.raises(ValueError, match="does not split"):
        rule("ours", "theirs", split(2, 2)).read([array(5)])


def test_joined_arrays_read_only_what_is_asked():
    parts = [np.arange(6).reshape(2, 3), 10 + np.arange(9).reshape(3, 3)]
    both = Joined(parts)
    whole = np.concatenate(parts)
    for a in range(6):
        for b in range(a, 6):
            index = (slice(a, b), slice(1, 3))
            np.testing.assert_array_equal(both[index], whole[index])
    assert both.shape == (5, 3) and (np.asarray(both) == whole).all()


def test_generate_continues_text_and_answers_a_chat(tmp_path, capsys):
    folder = with_tokenizer(write(tmp_path / "theirs", arrays=llama("float32")))
    tokenizer = seqlab.load_tokenizer(folder)
    assert (tokenizer.start, tokenizer.stops) == ((), (1,))
    assert generate(folder, prompt="the cat", steps=5, as_json=True) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["prompt_tokens"] == len(tokenizer.encode("the cat"))
    assert generate(folder, prompt="the cat", system="mew", chat=True, steps=5, as_json=True) == 0
    answer = json.loads(capsys.readouterr().out)
    ids = tokenizer.chat(
        [{"role": "system", "content": "mew"}, {"role": "user", "content": "the cat"}]
    )
    assert answer["prompt_tokens"] == len(ids) and ids.count(1) == 2
    with pytest.raises(DataError, match="holds '<|endoftext|>'"):
        generate(folder, prompt="a<|endoftext|>b", chat=True, steps=5)
    with pytest.raises(ConfigError, match="give --chat too"):
        generate(folder, prompt="a", system="b", steps=5)
    with pytest.raises(CheckpointError, match="not JSON"):
        (folder / "generation_config.json").write_text("{")
        generate(folder, prompt="a", steps=5)


def test_every_family_says_what_it_serves_once():
    served = pretrained.model_types()
    assert {"llama", "mistral", "qwen2", "qwen3"} <= served.keys()
    modules = set(served.values())
    assert sum(len(module.MODEL_TYPES) for module in modules) == len(served)
