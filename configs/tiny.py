"""A minute's look at the whole machine: two mixers, a few thousand tokens.

seqlab train configs/tiny.py
"""

from seqlab.layers.mixers import gla, mamba2
from seqlab.models import lm
from seqlab.train.config import Config, Optimizer
from seqlab.train.data import Data
from seqlab.train.sources import Text

split = {"files": ("python:stdlib",), "held_out": 0.05}
config = Config(
    model=lm.Config(vocab=257, d_model=64, pattern=(mamba2.Config(), gla.Config())),
    data=Data(
        train=(Text(**split, part="train", name="stdlib"),),
        held_out=(Text(**split, part="held_out", name="stdlib"),),
        length=128,
        batch=8,
    ),
    optimizer=Optimizer(lr=4e-3),
    steps=60,
    evaluate_every=30,
    samples=("def ", "import "),
    sample_tokens=100,
)
