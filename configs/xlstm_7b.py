"""xLSTM-7B (Beck et al., 2025) on rows of a million tokens: a plan for 64 chips, to be made first.

    seqlab plan configs/xlstm_7b.py --topology v5p:4x4x4
    seqlab tokenize 'texts/**' --out tokens --tokenizer tokenizer.json
    seqlab train configs/xlstm_7b.py

A row lies on 16 devices, each of which holds two of the eight heads: with the weights on 4 devices
they leave room for the activations of 65,536 tokens. What is expected is in docs/scaling.md.
"""

from seqlab.layers import ffn
from seqlab.layers.mixers import mlstm
from seqlab.models import lm
from seqlab.train.config import Config, Mesh, Optimizer
from seqlab.train.data import Data
from seqlab.train.sources import Tokens

LAYERS = 32

config = Config(
    model=lm.Config(
        vocab=50304,
        d_model=4096,
        pattern=(mlstm.Config(heads=8, layers=LAYERS, chunk_size=256),),
        repeats=LAYERS,
        ffn=ffn.Config(ratio=2.667, multiple_of=64),
        tie_embeddings=False,
        logit_cap=30.0,
        remat="all",
    ),
    data=Data(train=(Tokens(path="tokens"),), tokenizer="tokenizer.json", length=2**20, batch=1),
    optimizer=Optimizer(lr=3e-4, warmup=2000, weight_decay=0.1, clip=0.5),
    steps=20_000,
    mesh=Mesh(seq=16, model=4),
)
