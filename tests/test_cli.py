"""The command line and configs: each mistake is one sentence, a status, and nothing lost."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
from pydantic import ValidationError

from seqlab import cli, settings
from seqlab.errors import ConfigError
from seqlab.layers import registry
from seqlab.layers.mixers import attention, gla, mamba2
from seqlab.layers.registry import mixer_config, mixer_name, own_mixers
from seqlab.models import lm
from seqlab.train import config as configs
from seqlab.train.config import Config, Optimizer
from seqlab.train.loop import train
from tests.runs import tiny, write_texts

HEADER = """
import pathlib
from tests.runs import tiny
from seqlab.layers.mixers import gla
from seqlab.models import lm
from seqlab.train.config import Config, Mesh, Optimizer
from seqlab.train.data import Data
texts = pathlib.Path({texts!r})
"""


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts") / "texts")


@pytest.fixture
def config_file(texts, tmp_path):
    """Writes a config file that ends in the given lines."""

    def write(lines: str = "config = tiny(texts, steps=2)", name: str = "tiny.py"):
        path = tmp_path / name
        path.write_text(HEADER.format(texts=str(texts)) + lines + "\n")
        return path

    return write


@pytest.fixture
def run(monkeypatch, capsys):
    """(status, stdout, stderr) of a command."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["seqlab", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def refused(run):
    """The one sentence with which a command is refused."""

    def refused(*arguments, status=2):
        code, _, err = run(*arguments)
        assert code == status, err
        assert err.startswith("seqlab: ") and err.count("\n") == 1, err
        assert err.endswith((".\n", "?\n")) and "Traceback" not in err
        return err

    return refused


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory):
    """A run folder of two steps."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    train(tiny(texts, steps=2), folder, say=lambda text: None)
    return folder


@pytest.mark.parametrize(
    "override, message",
    [
        ("stepz=3", "There is no field 'stepz': did you mean 'steps'?"),
        ("optimizer.learning=1", "There is no field 'optimizer.learning': "),
        ("model.pattern.0.haeds=2", "did you mean 'heads'?"),
        ("model.pattern.1.heads=2", "model.pattern.1.heads: '1' is not an index below 1."),
        ("model.pattern.x=2", "'x' is not an index"),
        ("steps.more=3", "steps has no fields"),
        ("steps", "'steps' is not of the form name=value"),
        ("steps=many", "steps = 'many' is wrong"),
        ("steps=1.5", "steps = 1.5 is wrong"),
        ("steps=0", "steps = 0 is wrong"),
        ("steps=None", "steps = None is wrong"),
        ("data.train.0.weight=heavy", "data.train.0.weight = 'heavy' is wrong"),
        ("data.train.0.weight=0", "weight of source 'cats' is 0.0: give a number above 0"),
        ("optimizer.betas=[0.9]", "optimizer.betas"),
        ("optimizer.betas=[0.9,1.0]", "optimizer.betas is (0.9, 1.0): make it"),
        ("optimizer.lr=NaN", "optimizer.lr is nan: make it above 0"),
        ("optimizer.schedule=linear", "optimizer.schedule = 'linear' is wrong"),
        (
            "model.pattern.0.mixer=gal",
            "no mixer 'gal' (your own are given by --mixer FILE): did you mean 'gla'?",
        ),
        ("model.pattern.0.mixer=7", "names its mixer, for example gla, not 7"),
        ("model.pattern=[]", "must hold at least one mixer"),
        ("model.d_model=33", "does not divide into 2 heads"),
        ("model.d_model=-8", "must be at least 1"),
        ("model.vocab=200", "has 257 ids but the model only 200: set model.vocab=257"),
        ("data.tokenizer=/none/tokenizer.json", "/none/tokenizer.json"),
        ("data.train.0.files=['/none/*.txt']", "data.train.0.files"),
        ('data.train.0.files=["/none/*.txt"]', "No file matches '/none/*.txt'"),
        ("data.batch=4000", "less than one batch of 4000 x 32"),
        ("accumulate=3", "does not divide into accumulate = 3 parts"),
        ("mesh.data=3", "does not divide over mesh.data = 3"),
        ("mesh.model=32", "needs 32 devices but this machine has 16: make the mesh smaller"),
        ("mesh.strategy=rng", "There is no strategy 'rng': did you mean 'ring'?"),
    ],
)
def test_a_bad_override_is_one_sentence(refused, config_file, tmp_path, override, message):
    out = tmp_path / "run"
    assert message in refused("train", config_file(), override, "--out", out)
    assert not out.exists() or [path.name for path in out.iterdir()] == ["lock.json"]


@pytest.mark.parametrize(
    "lines, message",
    [
        ("x = 1", "defines no `config`"),
        ("config = 3", "defines no `config`"),
        ("config = tiny(", "SyntaxError"),
        ("\nraise RuntimeError('out of\\nluck')", "tiny.py, line 10: RuntimeError: out of."),
        ("import no_such_module", "line 9: ModuleNotFoundError: No module named 'no_such_module'."),
        ("lm.Config(d_model='x', vocab=3, pattern=())", "line 9: Config: d_model = 'x' is wrong"),
        ("lm.Config(d_modle=3, vocab=3)", "Config"),
        ("config = tiny(texts, stepz=3)", "Config has no field 'stepz'"),
        ("Optimizer(learning_rate=1.0)", "Config has no field 'learning_rate'"),
        ("gla.Config(haeds=2)", "Config has no field 'haeds'"),
        ("Mesh(dat=2)", "Mesh has no field 'dat'"),
        ("Optimizer(lr=-1)", "line 9: optimizer.lr is -1.0: make it above 0."),
        ("Data(train=())", "data.train names no source"),
        ("lm.Config(vocab=9, d_model=8, pattern=(3,))", "3 is not a mixer config"),
        ("1 / 0", "ZeroDivisionError: division by zero."),
    ],
)
def test_a_bad_config_file_is_one_sentence(refused, config_file, lines, message):
    assert message in refused("train", config_file(lines))


def test_a_config_file_that_is_not_there_is_one_sentence(refused, tmp_path):
    assert "There is no config file" in refused("train", tmp_path / "none.py")
    assert "There is no config file" in refused("train", tmp_path)


@pytest.mark.parametrize(
    "content, message", [(b"", "is empty: give"), (b"caf\xe9 " * 99, "is not UTF-8 (byte 3)")]
)
def test_bad_text_is_one_sentence(refused, config_file, tmp_path, content, message):
    (tmp_path / "bad.txt").write_bytes(content)
    files = f'data.train.0.files=["{tmp_path}/bad.txt"]'
    assert message in refused("train", config_file(), files, "--out", tmp_path / "run")


def test_another_run_or_a_file_in_the_way_is_one_sentence(refused, config_file, trained, tmp_path):
    before = {p: p.read_bytes() for p in trained.rglob("*") if p.is_file() and "lock" not in p.name}
    error = refused("train", config_file(), "seed=1", "--out", trained)
    assert "differs in seed (was 0, is 1): give the run another folder (--out)" in error
    assert {p: p.read_bytes() for p in before} == before
    (tmp_path / "file").write_text("x")
    assert "is not a folder" in refused("train", config_file(), "--out", tmp_path / "file")
    assert "Cannot write" in refused("train", config_file(), "--out", tmp_path / "file" / "run")


def test_a_damaged_run_is_one_sentence_and_stays_as_it_is(refused, config_file, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    (folder / "checkpoints" / "2" / "contents.json").write_text("{}")
    error = refused("train", config_file(), "--out", folder, status=74)
    assert "Every checkpoint in" in error and "is damaged" in error
    assert (folder / "metrics.jsonl").read_bytes() == (trained / "metrics.jsonl").read_bytes()
    (folder / "config.json").write_text("{")
    assert "config.json is damaged" in refused("train", config_file(), "--out", folder, status=74)


def test_a_model_that_cannot_be_loaded_is_one_sentence(refused, trained, tmp_path):
    assert "There is no model at" in refused("generate", tmp_path / "none", "--prompt", "a")
    assert "has no config.json" in refused("generate", tmp_path, "--prompt", "a")


def test_the_checker_refuses_unknown_mixers_and_fields(refused):
    assert "did you mean 'gla'" in refused("check", "gal")
    assert "did you mean 'heads'" in refused("check", "gla", "haeds=2")


def test_training_leaves_what_it_says_and_says_when_it_is_done(run, config_file, tmp_path):
    (tmp_path / "mine").mkdir()
    status, out, _ = run("train", config_file(), 'samples=["cat "]', "--out", tmp_path / "mine")
    assert status == 0 and "report.html" in out
    assert {"config.json", "metrics.jsonl", "checkpoints", "samples.txt", "report.html"} <= {
        path.name for path in (tmp_path / "mine").iterdir()
    }
    assert (tmp_path / "mine" / "samples.txt").read_text().startswith("cat ")
    status, out, _ = run("train", config_file(), 'samples=["cat "]', "--out", tmp_path / "mine")
    assert status == 0 and "is finished at step 2" in out


def test_the_module_is_the_command_and_errors_set_its_status(tmp_path):
    command = [sys.executable, "-m", "seqlab", "train", str(tmp_path / "none.py")]
    end = subprocess.run(command, capture_output=True, text=True)
    assert (end.returncode, end.stdout) == (2, "")
    assert end.stderr.startswith("seqlab: There is no config file") and end.stderr.count("\n") == 1


MIXER = """
from pydantic.dataclasses import dataclass
from seqlab.layers.mixers import gla

@dataclass(frozen=True)
class Config:
    heads: int = 2
    def build(self, d_model, *, rngs):
        return gla.Config(heads=self.heads, chunk_size=16).build(d_model, rngs=rngs)
"""


@pytest.fixture
def mixer_file(tmp_path, monkeypatch):
    path = tmp_path / "my_gla.py"
    path.write_text(MIXER)
    monkeypatch.setattr(registry, "_brought", dict(registry._brought))
    yield path
    sys.modules.pop("my_gla", None)


def test_a_mixer_of_ones_own_trains_and_generates(run, refused, config_file, mixer_file, tmp_path):
    use = 'model.pattern=[{"mixer":"my_gla"}]'
    assert "There is no mixer 'my_gla'" in refused("train", config_file(), use)
    arguments = ("train", config_file(), use, "--out", tmp_path / "run")
    assert run(*arguments, "--mixer", mixer_file)[0] == 0
    held = json.loads((tmp_path / "run" / "config.json").read_text())
    assert held["model"]["pattern"] == [{"mixer": "my_gla", "heads": 2}]
    generate = ("generate", tmp_path / "run", "--prompt", "a", "--steps", "3")
    assert run(*generate, "--mixer", mixer_file)[0] == 0
    registry._brought.clear()
    assert "There is no mixer 'my_gla'" in refused(*generate)


@pytest.mark.parametrize(
    "text, message",
    [
        ("import no_such_module", "raised ModuleNotFoundError: No module named 'no_such_module'."),
        ("x = 1", "defines no mixer: it needs a dataclass Config"),
        ("from seqlab.layers.mixers import gla\ngla.Config(heads='x')", "heads = 'x' is wrong"),
    ],
)
def test_a_bad_mixer_file_is_one_sentence(refused, config_file, mixer_file, text, message):
    mixer_file.write_text(text)
    assert message in refused("train", config_file(), "--mixer", mixer_file)


def test_a_mixer_file_may_not_take_a_name_that_is_taken(refused, config_file, tmp_path):
    (tmp_path / "gla.py").write_text(MIXER)
    error = refused("train", config_file(), "--mixer", tmp_path / "gla.py")
    assert "The mixer name 'gla' is taken" in error
    sys.modules.pop("gla", None)
    assert "There is no mixer file" in refused("train", config_file(), "--mixer", "none.py")


@pytest.mark.parametrize(
    "assignment, field, value",
    [
        ("steps=1e3", "steps", 1000),
        ("optimizer.lr=1e-3", "optimizer.lr", 1e-3),
        ("optimizer.betas=[0.8, 0.9]", "optimizer.betas", (0.8, 0.9)),
        ('samples=["a b", "c=d"]', "samples", ("a b", "c=d")),
        ("data.train.0.name=a=b=c", "data.train.0.name", "a=b=c"),
        ("data.train.0.name=two words", "data.train.0.name", "two words"),
        ("data.train.0.name=", "data.train.0.name", "texts"),
        ("data.held_out_rows=None", "data.held_out_rows", None),
        ("data.held_out_rows=null", "data.held_out_rows", None),
        ("track.tensorboard=true", "track.tensorboard", True),
        ("track.tensorboard=False", "track.tensorboard", False),
        ("model.ffn=None", "model.ffn", None),
        ("model.ffn.ratio=2", "model.ffn.ratio", 2.0),
        ("model.pattern.0.heads=4", "model.pattern.0.heads", 4),
        ("data.held_out=[]", "data.held_out", ()),
        ("track.wandb=" + "[" * 5000, "track.wandb", "[" * 5000),
    ],
)
def test_overrides_read_as_they_look(texts, assignment, field, value):
    config = settings.override(tiny(texts), [assignment])
    if field == "data.train.0.name" and value == "texts":
        value = str(texts / "*.txt")  # an empty name is filled in
    for part in field.split("."):
        config = config[int(part)] if part.isdigit() else getattr(config, part)
    assert config == value and type(config) is type(value)


def test_the_last_override_of_a_field_counts(texts):
    assert settings.override(tiny(texts), ["steps=3", "steps=5"]).steps == 5


@pytest.mark.parametrize("name", own_mixers())
def test_mixer_configs_survive_json(name):
    config = mixer_config(name)
    model = lm.Config(vocab=9, d_model=8, pattern=(config, config))
    text = json.dumps(settings.plain(model))
    assert settings.read(lm.Config, json.loads(text)) == model
    assert mixer_name(config) == name and json.loads(text)["pattern"][0]["mixer"] == name


def test_a_mixer_config_with_a_field_called_mixer_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Config:
        mixer: int = 3

    with pytest.raises(ConfigError, match="'mixer' names the mixer in every config: rename"):
        registry.to_plain(Config())


def test_a_whole_run_survives_json(texts):
    pattern = (gla.Config(heads=2), mamba2.Config(), attention.Config(window=8, sinks=1))
    config = tiny(texts, model=lm.Config(vocab=257, d_model=32, pattern=pattern, ffn=None))
    assert settings.read(Config, json.loads(json.dumps(settings.plain(config)))) == config


@pytest.mark.parametrize("kind", [lm.Config, gla.Config, Optimizer, configs.Checkpoint])
def test_no_config_takes_a_field_that_it_does_not_have(kind):
    with pytest.raises(ValidationError, match="unexpected"):
        kind(no_such_field=1)


def test_what_was_stored_is_read_strictly(texts):
    fields = settings.plain(tiny(texts))
    fields["data"]["train"][0]["wieght"] = 1
    with pytest.raises(ConfigError, match=r"data.train.0 has no field 'wieght': .*'weight'"):
        settings.read(Config, fields)


def test_a_config_file_may_import_what_lies_beside_it(config_file, tmp_path):
    (tmp_path / "beside.py").write_text("STEPS = 7")
    path = config_file("from beside import STEPS\nconfig = tiny(texts, steps=STEPS)")
    assert configs.load(path).steps == 7
    assert str(tmp_path) not in sys.path
    sys.modules.pop("beside")
