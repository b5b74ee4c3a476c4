"""A small hybrid on the Python standard library's own sources: Mamba-2, GLA and window attention.

    seqlab train configs/demo.py            (make demo)

2.5M parameters, byte tokens. Expected: held-out 1.94 bits per byte in about four minutes on two
CPU cores; zlib -9 needs 2.02 for the same files. configs/demo_long.py trains for longer.
"""

from seqlab.layers import ffn
from seqlab.layers.mixers import attention, gla, mamba2
from seqlab.models import lm
from seqlab.train.config import Checkpoint, Config, Optimizer
from seqlab.train.data import Data
from seqlab.train.sources import Text

stdlib = {"files": ("python:stdlib",), "held_out": 0.03}

config = Config(
    model=lm.Config(
        vocab=257,
        d_model=192,
        pattern=(
            mamba2.Config(head_dim=64, d_state=32),
            gla.Config(heads=4),
            attention.Config(heads=4, window=64),
        ),
        repeats=2,
        ffn=ffn.Config(ratio=2.0),
    ),
    data=Data(
        train=(Text(**stdlib, part="train", name="stdlib"),),
        held_out=(Text(**stdlib, part="held_out", name="stdlib"),),
        length=256,
        batch=4,
        held_out_rows=None,
    ),
    optimizer=Optimizer(lr=5e-3, warmup=30, final=0.05),
    steps=400,
    evaluate_every=200,
    checkpoint=Checkpoint(every=100),
    samples=("def ", "class ", "import os\n", "    if not isinstance("),
    sample_tokens=300,
)
