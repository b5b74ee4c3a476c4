"""The public names: present, documented, and cheap to import."""

import json
import pathlib
import subprocess
import sys
import tomllib

import pytest
import rich

import seqlab
from seqlab import doctor, kernels
from seqlab.errors import ConfigError
from seqlab.models import lm

ROOT = pathlib.Path(__file__).parent.parent

#: Other programs rely on these. Removing one needs a line in CHANGELOG.md.
PUBLIC = [
    "LM",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "LMConfig",
    "Mixer",
    "ModelError",
    "NumericalError",
    "SeqlabError",
    "Session",
    "build",
    "check",
    "export_hf",
    "generate",
    "load",
    "load_tokenizer",
    "mixer_config",
    "mixers",
    "parallel",
    "register_mixer",
    "save",
]

#: Extras, and what only a run or a report needs.
HEAVY = ("torch", "transformers", "tokenizers", "wandb", "tensorboardX", "matplotlib", "grain")


def python(*args: str) -> str:
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_public_names_are_those_that_are_promised():
    assert sorted(seqlab.__all__) == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_there_and_documented(name):
    thing = getattr(seqlab, name)
    assert (thing.__doc__ or "").strip(), f"seqlab.{name} has no docstring"


def test_importing_seqlab_imports_nothing_heavy():
    found = json.loads(
        python("-c", "import seqlab, sys, json; print(json.dumps(list(sys.modules)))")
    )
    assert set(found).isdisjoint(HEAVY)


def test_importing_seqlab_starts_no_device():
    python("-c", "import seqlab, jax; jax.config.update('jax_num_cpu_devices', 3)")


def test_every_command_has_help():
    listed = python("-m", "seqlab", "--help")
    for command in ("train", "generate", "check", "tokenize", "doctor"):
        assert command in listed


def test_the_version_is_that_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == seqlab.__version__


def test_the_package_tells_type_checkers_that_it_is_typed():
    assert (ROOT / "seqlab" / "py.typed").exists()


def test_build_takes_a_config_or_the_path_of_a_config_file():
    config = lm.Config(vocab=257, d_model=8, pattern=(seqlab.mixer_config("gla"),), ffn=None)
    assert seqlab.build(config).config == config
    assert seqlab.build(ROOT / "configs" / "tiny.py").config.vocab == 257
    with pytest.raises(ConfigError, match="takes an LMConfig or the path"):
        seqlab.build({"vocab": 257})


def test_constraints_are_exact_versions_and_nothing_else():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    for pin in pins:
        name, _, version = pin.partition("==")
        assert name.replace("-", "").replace("_", "").replace(".", "").isalnum(), pin
        assert version and set(version) <= set("0123456789."), pin
    assert len({pin.partition("==")[0].lower() for pin in pins}) == len(pins)


def test_the_doctor_knows_every_kernel(capsys):
    rich.print(doctor.implementations())
    folders = {f.name for f in pathlib.Path(kernels.__path__[0]).iterdir() if f.is_dir()}
    shown = capsys.readouterr().out
    parts = {"on_gpu", "on_tpu", "__pycache__"}  # what families are made of
    assert all(f" {family} " in shown for family in folders - parts)
