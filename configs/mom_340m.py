"""Mixture-of-Memories as published for 340M parameters, on 15B tokens (Du et al., 2025).

    seqlab tokenize 'texts/**' --out tokens --tokenizer tokenizer.json
    seqlab train configs/mom_340m.py

It has 512M, of which a token uses 411M. The published run is on SlimPajama; expected there: a
perplexity of 25.9 on WikiText (26.5 for the gated delta rule alone), and an average of 28.2 on FDA,
SWDE, SQuAD, NQ, TriviaQA and DROP (24.8).
"""

from seqlab.layers import ffn, norm
from seqlab.layers.mixers import mom
from seqlab.models import block, lm
from seqlab.train.config import Config, Optimizer
from seqlab.train.data import Data
from seqlab.train.sources import Tokens

norms = norm.Config(eps=1e-6)

config = Config(
    model=lm.Config(
        vocab=32000,
        d_model=1024,
        pattern=(
            mom.Config(memories=4, top_k=2, heads=4, key_dim=256, value_dim=256, aux_scale=0.01),
        ),
        repeats=24,
        ffn=ffn.Config(ratio=2.0, multiple_of=256),
        join=block.Join(norm=norms),
        norm=norms,
    ),
    data=Data(train=(Tokens(path="tokens"),), tokenizer="tokenizer.json", length=2048, batch=256),
    optimizer=Optimizer(lr=3e-4, warmup=1024, weight_decay=0.01),
    steps=30_720,
)
