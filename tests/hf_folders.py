"""Published folders written by hand, without torch: what a test changes in them is all it needs."""

import json
import pathlib

import numpy as np

from seqlab.models import tensors
from tests.runs import write_tokenizer

CONFIG = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 1,
}
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def llama(dtype: str = "bfloat16") -> dict[str, np.ndarray]:
    """The tensors of the model that CONFIG describes."""
    D, F, V, K = 16, 24, 300, 8
    layer = {
        "input_layernorm": (D,),
        "post_attention_layernorm": (D,),
        "self_attn.q_proj": (2 * K, D),
        "self_attn.k_proj": (K, D),
        "self_attn.v_proj": (K, D),
        "self_attn.o_proj": (D, 2 * K),
        "mlp.gate_proj": (F, D),
        "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
    }
    shapes = {"model.embed_tokens": (V, D), "model.norm": (D,), "lm_head": (V, D)}
    shapes |= {f"model.layers.{n}.{name}": s for n in range(2) for name, s in layer.items()}
    r = np.random.default_rng(0)
    return {f"{n}.weight": r.normal(size=s).astype(np.dtype(dtype)) for n, s in shapes.items()}


def write(folder: pathlib.Path, config: dict = CONFIG, arrays=None, shard=None) -> pathlib.Path:
    """A published folder with its weights, in files of at most `shard` bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    arrays = llama() if arrays is None else arrays
    tensors.write(folder, arrays, shard or tensors.SHARD)
    return folder


def with_tokenizer(folder: pathlib.Path) -> pathlib.Path:
    """The same with a tokenizer and a chat template, as newer versions of transformers lay them."""
    write_tokenizer(folder)
    end = {"__type": "AddedToken", "content": "<|endoftext|>"}
    settings = {"bos_token": None, "eos_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def bits(arrays) -> dict[str, tuple]:
    """What to compare named arrays by, so that nothing less than equality will do."""
    return {n: (str(a.dtype), a.shape, np.asarray(a).tobytes()) for n, a in arrays.items()}
