"""Mixture-of-Memories as published for 1.3B parameters, on 100B tokens (Du et al., 2025).

    seqlab tokenize 'texts/**' --out tokens --tokenizer tokenizer.json
    seqlab train configs/mom_1_3b.py

It has 1553M, of which a token uses 1352M. The published run is on SlimPajama; expected there: a
perplexity of 16.6 on WikiText (17.1 for the gated delta rule alone), and an average of 36.0 on FDA,
SWDE, SQuAD, NQ, TriviaQA and DROP (32.3).
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
        d_model=2048,
        pattern=(
            mom.Config(memories=4, top_k=2, heads=4, key_dim=256, value_dim=256, aux_scale=0.01),
        ),
        repeats=24,
        ffn=ffn.Config(ratio=8 / 3, multiple_of=256),
        join=block.Join(norm=norms),
        norm=norms,
    ),
    data=Data(train=(Tokens(path="tokens"),), tokenizer="tokenizer.json", length=2048, batch=1024),
    optimizer=Optimizer(lr=3e-4, warmup=480, weight_decay=0.01),
    steps=47_700,
)
