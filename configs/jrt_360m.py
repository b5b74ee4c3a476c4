"""JRT-RNN with 360M parameters (Just Read Twice, Arora et al., 2024), as published.

    seqlab tokenize 'texts/**' --out tokens --tokenizer tokenizer.json
    seqlab train configs/jrt_360m.py mesh.data=8
    seqlab generate runs/jrt_360m --prompt-file question.txt --read-twice

Trained on 30 billion tokens, it recalled 42.9 % of what six tasks asked for out of at most 1,024
tokens; a transformer of its size 43.4 %, a causal Based model 29.2 %. The tokenizer has 50,257 ids;
the one after them is the mask.
"""

from seqlab.layers import ffn
from seqlab.layers.mixers import attention, gated_conv, prefix_linear_attention
from seqlab.models import lm
from seqlab.train.config import Config, Optimizer
from seqlab.train.data import Data
from seqlab.train.objective import Prefix
from seqlab.train.sources import Tokens

PREFIX, IDS = 1024, 50257
conv = gated_conv.Config(expand=2, gate_before=False, silu=True, bias=True)
reads = prefix_linear_attention.Config(PREFIX, heads=16, key_dim=16)
near = attention.Config(heads=16, window=256)

config = Config(
    model=lm.Config(
        vocab=50264,  # room for the mask, and a multiple of 8
        d_model=1024,
        pattern=(conv, reads, near, conv, conv),
        repeats=5,
        after=(conv,),
        ffn=ffn.Config(ratio=2.0),
    ),
    data=Data(train=(Tokens(path="tokens"),), tokenizer="tokenizer.json", length=2048, batch=256),
    optimizer=Optimizer(lr=8e-4, warmup=600, final=0.1, weight_decay=0.1, betas=(0.9, 0.95)),
    objective=Prefix(prefix_len=PREFIX, mask=IDS),
    steps=60_000,
)
