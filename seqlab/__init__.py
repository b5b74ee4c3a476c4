"""seqlab: a JAX framework for new sequence architectures. One contract, one law, one file a mixer.

    gla = seqlab.mixer_config("gla", heads=4)
    model = seqlab.build(seqlab.LMConfig(vocab=257, d_model=128, pattern=(gla,), repeats=2))
    logits, state = model(tokens, state, reset=reset)

Start with README.md; `seqlab.layers.mixer` states the contract that everything here obeys.
"""

import os
import pathlib
from typing import Any

from flax import nnx

from seqlab import parallel
from seqlab.conformance.suite import check
from seqlab.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    NumericalError,
    SeqlabError,
)
from seqlab.infer.generate import generate
from seqlab.infer.session import Session
from seqlab.layers.linear_kinds import check_trains
from seqlab.layers.mixer import Mixer
from seqlab.layers.registry import mixer_config, mixers, register_mixer
from seqlab.models.export import export_hf
from seqlab.models.lm import LM
from seqlab.models.lm import Config as LMConfig
from seqlab.models.store import load, load_tokenizer, save

__version__ = "0.1.0"

__all__ = [
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


def build(config: "LMConfig | str | os.PathLike[str] | Any", seed: int = 0) -> LM:
    """A new model from an `LMConfig`, or from the config file of a run, its weights drawn anew.

    Raises ConfigError where the file or the config is wrong.
    """
    if isinstance(config, (str, os.PathLike)):
        from seqlab.train.config import load as load_config

        config = load_config(pathlib.Path(config)).model
    if not isinstance(config, LMConfig):
        raise ConfigError(f"build takes an LMConfig or the path of a config file, not {config!r}.")
    check_trains(config.linear)
    return config.build(rngs=nnx.Rngs(seed))
