"""Titans with memory as a gate, 340M parameters (Behrouz, Zhong & Mirrokni, 2024, section 5.1).

    seqlab tokenize 'texts/**' --out tokens --tokenizer tokenizer.json
    seqlab train configs/titans_mag_340m.py

Published are the size, rows of 4096 tokens in batches of half a million, 15B tokens of FineWeb-Edu
with Llama 2's vocabulary, and the optimizer. Heads, window, persistent tokens, chunk, the width of
memory and ffn are not, and are chosen here; so is the warm-up. The paper reports a perplexity of
25.07 on Wikitext; nobody has confirmed it in public, and neither has this file.
"""

from seqlab.layers import ffn, neural_memory, window_attention
from seqlab.layers.mixers import titans_mag
from seqlab.models import lm
from seqlab.train.config import Config, Optimizer
from seqlab.train.data import Data
from seqlab.train.sources import Tokens

config = Config(
    model=lm.Config(
        vocab=32000,
        d_model=1024,
        pattern=(
            titans_mag.Config(
                attention=window_attention.Config(heads=16, window=512, persistent=16),
                memory=neural_memory.Config(heads=16, expand=4.0, chunk_size=64, max_inner_lr=0.03),
            ),
        ),
        repeats=24,
        ffn=ffn.Config(ratio=1.5),
        remat="all",
    ),
    data=Data(train=(Tokens(path="tokens"),), tokenizer="tokenizer.json", length=4096, batch=128),
    optimizer=Optimizer(lr=4e-4, warmup=1000, weight_decay=0.1),
    steps=28_610,
)
