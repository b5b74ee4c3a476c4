"""`seqlab.generate`: a prompt in, a continuation out."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from seqlab import settings
from seqlab.errors import ConfigError, ModelError
from seqlab.infer import prompt as prompts
from seqlab.infer.sample import Sampling
from seqlab.infer.session import Block, Session
from seqlab.layers.mixer import State


def generate(
    model: Any,
    prompt: Any,
    *,
    steps: int,
    state: State = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    stop: int | Sequence[int] | None = None,
    chunk_size: int = 512,
    stream: Callable[[Block], None] | None = None,
) -> np.ndarray:
    """The `steps` tokens that follow a prompt: int32 [steps] for one row, [B, steps] for a batch.

    prompt   ids [T] or [B, T], a list of rows of any lengths, or an iterator of arrays of ids;
             every row gives what it gives alone
    state    the state that the prompt continues (it is left as it is); None is a new text
    stop     token ids that end a row. A row that ends early is filled up with the first of them.
    stream   called with each `Block` of tokens as it comes

    The filters are those of `Sampling`; temperature 0 is greedy. Memory depends neither on the
    length of the prompt, which is read `chunk_size` tokens at a time, nor on `steps`. For lengths,
    reasons of ending, the state and what comes after, use a `Session`.

    Raises DataError for an empty prompt or an id outside the vocabulary, ConfigError for settings
    out of range, ModelError for a state of another model, for more tokens than the model's
    `max_length`, and for logits that are not finite.
    """
    choices = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    sampling = settings.read(Sampling, choices, where="generate")
    if steps < 1:
        raise ConfigError(f"steps must be at least 1, not {steps}.")
    session = Session(model, state, chunk_size=chunk_size)
    single = prompts.is_stream(prompt) or not prompts.is_batch(prompt)
    if not prompts.is_stream(prompt):
        prompt = prompts.rows_of(prompt, model.config.vocab)
        _require_room(model, max(row.size for row in prompt), steps)
    session.feed(prompt)
    done = session.complete(steps, sampling, seed=seed, stop=stop, stream=stream)
    if "nan" in done.finish:
        rows = [b for b, reason in enumerate(done.finish) if reason == "nan"]
        raise ModelError(
            f"The logits of rows {rows} are not finite: weights or state are damaged, or the state "
            "is past the model's max_length; a Session gives the tokens before that."
        )
    return done.tokens[0] if single and len(done.tokens) == 1 else done.tokens


def _require_room(model: Any, length: int, steps: int) -> None:
    limit = model.max_length
    if limit is not None and length + steps > limit:
        raise ModelError(
            f"A prompt of {length} tokens and {steps} steps make {length + steps} but the model's "
            f"max_length is {limit}: shorten them, or build the model with a larger max_length."
        )
