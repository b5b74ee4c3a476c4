"""Tiny random models of transformers, and what every family that we read must hold.

CASES = {"llama": lambda: transformers.LlamaConfig(**TINY)}

@pytest.mark.parametrize("name", CASES)
def test_this_family_is_that_of_transformers(name, tmp_path):
    hold(CASES[name](), tmp_path)
"""

import pathlib
import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

import seqlab
from seqlab.conformance.tolerance import assert_same_logits
from seqlab.models import pretrained, tensors
from seqlab.models.parameters import parameters
from tests.hf_folders import bits

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)

B, T, PREFILL = 2, 48, 37  # tokens a row; the first of them are read at once, the rest one by one

#: Sizes that most families call by these names.
TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

_step = jax.jit(lambda model, tokens, state: model(tokens, state))


def hold(
    config: Any,
    folder: pathlib.Path,
    adjust: Callable | None = None,
    buffers: str = r"(?!)",
    same: Callable = assert_same_logits,
) -> seqlab.LM:
    """Everything that a family must hold, of one random model; returns ours.

    Logits equal transformers', read at once and one by one; exported, they are to the bit those of
    the model it came from; files and weights survive the way there and back to the bit. `adjust`
    is called with the torch model, to change what `heat` made of it; tensors whose names match
    `buffers` follow from the config and need not be exported; `same` says what equal logits are.
    """
    theirs = build(config, folder / "theirs", adjust)
    ours = seqlab.load(folder / "theirs")
    tokens = np.random.default_rng(1).integers(0, ours.config.vocab, (B, T), np.int32)
    expected = torch_logits(theirs, tokens)
    assert 4 < np.abs(expected).max() < 40, "adjust the weights: logits are to be of size ten"
    same(logits(ours, tokens), expected)

    seqlab.export_hf(ours, folder / "exported")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "exported", attn_implementation="eager", dtype=torch.float32
    ).eval()
    assert (torch_logits(again, tokens) == expected).all(), "exported, it computes something else"
    held = pretrained.read(folder / "theirs", pretrained.model_types()[config.model_type])
    weights = {name: a for name, a in held.items() if not re.search(buffers, name)}
    assert bits(tensors.read(folder / "exported")) == bits(weights)
    assert bits(parameters(seqlab.load(folder / "exported"))) == bits(parameters(ours))
    return ours


def build(config: Any, folder: pathlib.Path, adjust: Callable | None = None) -> Any:
    """A random torch model whose weights all matter, saved in `folder`."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.float().eval()
    heat(model)
    if adjust is not None:
        adjust(model)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def heat(model: Any) -> None:
    """Weights large enough for every part to show in the logits, vectors off where they start."""
    for name, weight in model.named_parameters():
        if weight.ndim < 2 or name.endswith(("A_log", ".D")):
            weight += 0.2 * torch.randn_like(weight)
        elif "embed" in name or "lm_head" in name:
            weight.copy_(0.4 * torch.randn_like(weight))
        else:
            fan_in = weight[0].numel() if weight.ndim == 2 else weight.shape[-1]
            weight.copy_(torch.randn_like(weight) * fan_in**-0.5)


@torch.no_grad()
def rank_differently(model: Any) -> None:
    """For `adjust`: corrections that change which experts DeepSeek's routers choose."""
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.3 * torch.randn_like(buffer))


@torch.no_grad()
def torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    return model(torch.tensor(tokens, dtype=torch.long), use_cache=False).logits.float().numpy()


def logits(model: seqlab.LM, tokens: np.ndarray) -> np.ndarray:
    """[B, T, vocab]: the first tokens read at once, the rest one by one, in two programs."""
    with jax.default_matmul_precision("highest"):
        first, state = _step(model, jnp.asarray(tokens[:, :PREFILL]), model.init_state(len(tokens)))
        rest = []
        for t in range(PREFILL, tokens.shape[1]):
            one, state = _step(model, jnp.asarray(tokens[:, t : t + 1]), state)
            rest.append(one)
    return np.concatenate([first, *rest], 1)
