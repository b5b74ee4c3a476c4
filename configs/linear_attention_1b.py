"""Linear attention with 1.3B parameters on rows of eight million tokens: a plan for 256 chips.

    seqlab plan configs/linear_attention_1b.py --topology v5p:4x8x8
    seqlab tokenize 'texts/**' --out tokens --tokenizer tokenizer.json
    seqlab train configs/linear_attention_1b.py

Weights and moments fit on one device, so that all of them go along the row: 32,768 tokens each.
What is expected is in docs/scaling.md.
"""

from seqlab.layers import feature_maps
from seqlab.layers.mixers import linear_attention
from seqlab.models import lm
from seqlab.train.config import Config, Mesh, Optimizer
from seqlab.train.data import Data
from seqlab.train.sources import Tokens

config = Config(
    model=lm.Config(
        vocab=32000,
        d_model=2048,
        pattern=(
            linear_attention.Config(
                heads=16,
                feature_map=feature_maps.Config(kind="identity"),
                scale=True,
                normaliser=False,
                norm_eps=1e-6,
                chunk_size=256,
            ),
        ),
        repeats=24,
        remat="all",
    ),
    data=Data(train=(Tokens(path="tokens"),), tokenizer="tokenizer.json", length=2**23, batch=1),
    optimizer=Optimizer(lr=3e-4, warmup=2000, weight_decay=0.1),
    steps=20_000,
    mesh=Mesh(seq=256),
)
