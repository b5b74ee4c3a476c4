"""The MatMul-free LM of 370M parameters (Zhu et al., 2024): MLGRU and GLUs with ternary weights.

    seqlab tokenize 'texts/**' --out tokens --tokenizer tokenizer.json
    seqlab train configs/matmul_free_370m.py

Sizes, learning rate and its schedule, a cosine that is halved midway, are those of the paper, which
trains on 15B tokens of SlimPajama with the tokenizer of Mistral. The loss falls late, as the rate
nears zero, so judge finished runs alone; expected there is 40.3 on average over six tasks without
examples, 41.1 being that of a transformer of this size. The paper does not say how many tokens make
a step.

Gates of each layer are bounded by numbers of its own, so the program holds every layer.
"""

from seqlab.layers import bit_linear, ffn
from seqlab.layers.mixers import mlgru
from seqlab.models import lm
from seqlab.train.config import Config, Mesh, Optimizer
from seqlab.train.data import Data
from seqlab.train.sources import Tokens


def matmul_free(d_model: int, layers: int) -> lm.Config:
    """The model at any size, as it is published and as it starts."""
    small = {"std": 0.02, "down_std": 0.02 * (2 * layers) ** -0.5}
    return lm.Config(
        vocab=32000,
        d_model=d_model,
        pattern=tuple(mlgru.Config(layer=n, layers=layers) for n in range(layers)),
        ffn=ffn.Config(multiple_of=256, joined=True, **small),
        linear=bit_linear.Config(eps=1e-6),
        tie_embeddings=False,
    )


config = Config(
    model=matmul_free(d_model=1024, layers=24),
    data=Data(train=(Tokens(path="tokens"),), tokenizer="tokenizer.json", length=2048, batch=256),
    optimizer=Optimizer(lr=4e-3, warmup=1000, final=0.0, second_half=0.5),
    steps=28_600,
    mesh=Mesh(data=8),
)
