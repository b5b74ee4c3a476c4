"""Models of transformers, made for a benchmark, and the same models with the same weights here."""

import dataclasses
import importlib.util
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import torch
import transformers

import seqlab
from seqlab.bench import training
from seqlab.errors import SeqlabError
from seqlab.infer.session import Session
from seqlab.models.lm import LM

D, VOCAB, STEPS = 512, 256, 8

#: What is raced: a config of transformers by the number of layers and the longest document.
CONFIGS: dict[str, Callable[[int, int], Any]] = {
    "mamba": lambda layers, length: transformers.MambaConfig(
        vocab_size=VOCAB, hidden_size=D, num_hidden_layers=layers, use_mambapy=False
    ),
    "mamba, mamba.py": lambda layers, length: transformers.MambaConfig(
        vocab_size=VOCAB, hidden_size=D, num_hidden_layers=layers, use_mambapy=True
    ),
    "mamba2": lambda layers, length: transformers.Mamba2Config(
        vocab_size=VOCAB,
        hidden_size=D,
        num_heads=16,
        head_dim=64,
        state_size=128,
        n_groups=1,
        num_hidden_layers=layers,
    ),
    "xlstm": lambda layers, length: transformers.xLSTMConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        num_heads=4,
        num_blocks=layers,
        num_hidden_layers=layers,
        mode="train",
    ),
    "qwen3_next": lambda layers, length: transformers.Qwen3NextConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=1408,
        num_hidden_layers=layers,
        layer_types=["linear_attention"] * layers,
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=128,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        num_experts=0,
        max_position_embeddings=length,
    ),
    "llama": lambda layers, length: transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=1408,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=length,
    ),
}


class Pair(NamedTuple):
    ours: LM
    theirs: torch.nn.Module


def pair(name: str, layers: int, length: int) -> Pair | None:
    """A random model of transformers, and the same here; None, with the reason, where one of the
    two does not exist."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if "mamba.py" in name and importlib.util.find_spec("mambapy") is None:
        print(f"{name} is left out: pip install mambapy", flush=True)
        return None
    try:
        torch.manual_seed(0)
        theirs = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](layers, length))
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            return Pair(seqlab.load(folder, max_length=length), theirs.float())
    except (SeqlabError, ImportError) as why:
        print(f"{name} is left out: {why}", flush=True)
        return None


def tokens(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (batch, length + 1), np.int32)


def our_training(model: LM, batch: int, length: int) -> tuple[Callable[[], object], int]:
    """One training step, and the bytes that its program holds beside parameters and batch. Its
    layers are compiled one by one, as a short run of a small model may well ask for."""
    model.config = dataclasses.replace(model.config, unroll=model.config.repeats)
    step = training.step(model, tokens(batch, length))
    return step.work, step.bytes


def their_training(model: torch.nn.Module, batch: int, length: int) -> Callable[[], object]:
    ids = torch.from_numpy(tokens(batch, length)[:, :-1]).long()
    adamw = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=True)
    model.train()

    def work():
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)

    return work


def our_passes(model: LM, batch: int, length: int) -> dict[str, Callable[[], object]]:
    """Forward, forward and backward, and STEPS of decoding from half the length on."""
    ids = tokens(batch, length)

    def loss(model):
        logits, _ = model(ids[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    forward, both = jax.jit(lambda model: model(ids[:, :-1])[0]), jax.jit(jax.grad(loss))
    session = Session(model, block=STEPS)
    session.feed(ids[:, : length // 2])
    return {
        "forward": lambda: jax.block_until_ready(forward(model)),
        "forward and backward": lambda: jax.block_until_ready(both(model)),
        "decode": lambda: session.complete(STEPS),
    }


def their_passes(
    model: torch.nn.Module, batch: int, length: int
) -> dict[str, Callable[[], object]]:
    ids = torch.from_numpy(tokens(batch, length)[:, :-1]).long()

    def forward():
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)

    def both():
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    passes = {"forward": forward, "forward and backward": both}
    try:
        decode = their_decoding(model, ids[:, : length // 2])
        decode()
        return passes | {"decode": decode}
    except ValueError as why:  # xLSTM in the mode that trains
        print(f"{type(model).__name__} does not decode: {why}", flush=True)
        return passes


def their_decoding(
    model: torch.nn.Module, prompt: torch.Tensor, count: int = STEPS
) -> Callable[[], object]:
    """So many tokens after a prompt [B, T], greedily."""
    with torch.no_grad():
        first = model(input_ids=prompt, use_cache=True)
    cache = "past_key_values" if "past_key_values" in first else "cache_params"

    def steps():  # the cache is written in place; attention's grows by a token at a time
        token = prompt[:, :1]
        with torch.no_grad():
            for _ in range(count):
                out = model(input_ids=token, use_cache=True, **{cache: first[cache]})
                token = out.logits[:, -1:].argmax(-1)

    return steps
