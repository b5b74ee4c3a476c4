"""Tokenizers of published models: what begins and ends a text, and conversations as templates
write them, both as transformers has them."""

import json

import pytest
import transformers
from tokenizers import Tokenizer, processors

import seqlab
from seqlab.errors import CheckpointError, ModelError
from seqlab.models import published_tokenizer
from seqlab.models.published_tokenizer import PublishedTokenizer
from tests.hf_folders import CONFIG, TEMPLATE, with_tokenizer, write

TALK = [
    {"role": "system", "content": " Be <b>brief</b>.\n"},
    {"role": "user", "content": "the cat said 'mat' \N{SNOWMAN}"},
    {"role": "assistant", "content": "on the mat"},
    {"role": "user", "content": "the end?"},
]
TEMPLATES = {
    "plain": TEMPLATE,
    "loops, namespaces and macros": """
{%- set ns = namespace(last=none) -%}
{%- macro say(role, text) -%}<|{{ role }}|>{{ text | trim }}{%- endmacro -%}
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{% continue %}{% endif %}
    {%- if loop.first or ns.last != message.role %}
        {{- say(message['role'], message['content']) }}
    {%- endif %}
    {%- set ns.last = message['role'] %}
    {%- if loop.last %}{{ eos_token }}{% break %}{% endif %}
{%- endfor %}
""",
    "JSON and what a model wrote": """
{% for m in messages %}
    {% if m.role == 'assistant' %}
{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}
    {% else %}
{{ m | tojson }} {{ m | tojson(indent=1) }}
    {% endif %}
{% endfor %}
{{ dict(a=range(3) | list) }}{% if tools is none %}no tools{% endif %}
""",
}


@pytest.fixture
def folder(tmp_path):
    return with_tokenizer(write(tmp_path / "theirs"))


def change(folder, file, **fields):
    path = folder / file
    held = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(held | fields))


def theirs(folder):
    # what a user writes is text to us and a mark to them: their own options are left alone
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_is_what_transformers_makes_of_it(folder, name):
    (folder / "chat_template.jinja").write_text(TEMPLATES[name])
    change(folder, "tokenizer_config.json", bos_token="<unk>")
    ours, expected = seqlab.load_tokenizer(folder), theirs(folder)
    text = expected.apply_chat_template(TALK, add_generation_prompt=True, tokenize=False)
    assert ours.chat(TALK) == expected(text, add_special_tokens=False)["input_ids"]
    assert ours.encode("<|endoftext|>") != [1]  # outside of templates a mark is just text


@pytest.mark.parametrize(
    "fields",
    [
        {"chat_template": TEMPLATE},
        {
            "chat_template": [
                {"name": "tools", "template": "x"},
                {"name": "default", "template": TEMPLATE},
            ]
        },
    ],
)
def test_older_files_have_the_template_as_a_field(folder, fields):
    expected = seqlab.load_tokenizer(folder).chat(TALK)
    (folder / "chat_template.jinja").unlink()
    change(folder, "tokenizer_config.json", **fields)
    assert seqlab.load_tokenizer(folder).chat(TALK) == expected
    change(folder, "tokenizer_config.json", chat_template=None)
    change(folder, "chat_template.json", chat_template=TEMPLATE)
    assert seqlab.load_tokenizer(folder).chat(TALK) == expected
    (folder / "chat_template.json").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        seqlab.load_tokenizer(folder).chat(TALK)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "Expected an expression"),
        ("{{ messages[0].x.y }}", "has no attribute"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ raise_exception.__globals__.x }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for i in range(10000000) %}{% endfor %}", "Range too big"),
        ("{% set ns = namespace() %}{% set ns.__init__ = 1 %}", "cannot be set"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ cycler }}{{ lipsum.x }}", "undefined"),
    ],
)
def test_a_template_that_fails_or_reaches_out_is_refused(folder, template, reason):
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelError, match=f"does not take these messages .*{reason}") as caught:
        seqlab.load_tokenizer(folder).chat(TALK)
    assert "\n" not in str(caught.value)


def test_the_tokens_that_end_a_text_are_those_of_the_generation_config_first(folder):
    ends = lambda: seqlab.load_tokenizer(folder).stops
    change(folder, "config.json", eos_token_id=None)
    assert ends() == (1,)  # the eos_token of tokenizer_config.json
    change(folder, "config.json", eos_token_id=7)
    assert ends() == (7,)
    change(folder, "generation_config.json", eos_token_id=[5, 6])
    assert ends() == (5, 6) and seqlab.load_tokenizer(folder).stop == 5


def test_a_start_token_is_added_as_tokenizer_json_does(folder):
    tokenizer = seqlab.load_tokenizer(folder)
    assert tokenizer.prompt("the cat") == tokenizer.encode("the cat")
    assert tokenizer.document("the cat").tolist() == [*tokenizer.encode("the cat"), 1]
    before = tokenizer.fingerprint

    path = str(folder / "tokenizer.json")
    file = Tokenizer.from_file(path)
    file.post_processor = processors.TemplateProcessing(
        single="<unk> $A", special_tokens=[("<unk>", 0)]
    )
    file.save(path)
    tokenizer = seqlab.load_tokenizer(folder)
    assert tokenizer.prompt("the cat") == theirs(folder)("the cat")["input_ids"]
    assert tokenizer.start == (0,) and tokenizer.fingerprint != before


def test_a_start_token_is_added_as_older_settings_say(folder):
    change(folder, "tokenizer_config.json", bos_token="<unk>", add_bos_token=True)
    assert seqlab.load_tokenizer(folder).start == (0,)


def test_a_saved_model_keeps_what_ends_its_texts(folder, tmp_path):
    own = seqlab.save(seqlab.load(folder), tmp_path / "own", tokenizer=folder)
    assert seqlab.load_tokenizer(own).fingerprint == seqlab.load_tokenizer(folder).fingerprint
    seqlab.save(seqlab.load(folder), own, tokenizer=None)
    with pytest.raises(ModelError, match="saved without a tokenizer"):
        seqlab.load_tokenizer(own)


def test_files_that_are_no_tokenizer_are_refused(folder, monkeypatch):
    change(folder, "tokenizer_config.json", eos_token={"content": 3}, bos_token=["x"])
    change(folder, "config.json", **CONFIG | {"eos_token_id": "x"})
    assert PublishedTokenizer(folder).stops == ()
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        PublishedTokenizer(folder)
    monkeypatch.setattr(published_tokenizer, "LARGEST", 3)
    with pytest.raises(CheckpointError, match="far larger"):
        PublishedTokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer\.json.*AutoTokenizer"):
        PublishedTokenizer(folder)
