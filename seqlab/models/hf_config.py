"""config.json of a published checkpoint, its old and new spellings brought to one."""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from seqlab.errors import CheckpointError, ModelError
from seqlab.layers.rope import Linear, Llama3, LongRope, Yarn

CONFIG = "config.json"
LONGEST = 4096  # tokens that full attention holds unless it is told otherwise


class Fields(dict):
    """The fields of a model that reads text; to ask for one that is absent is a ModelError.

    Today's names hold, those of transformers 5: `dtype`, and `rope_parameters` as `rope()` reads
    it. A multimodal model's `text_config` is taken out. `max_length` is what the caller asked for,
    and `nulls` are the fields that the file has as null, which are as absent.
    """

    max_length: int | None = None
    nulls: frozenset[str] = frozenset()

    def __missing__(self, name: str):
        raise ModelError(f"{CONFIG} lacks {name!r}, which this family needs: get the whole file.")

    def over(self, defaults: dict[str, Any]) -> "Fields":
        """These fields, over what the file leaves open; its nulls stay absent."""
        full = Fields({n: v for n, v in defaults.items() if n not in self.nulls} | self)
        full.max_length, full.nulls = self.max_length, self.nulls
        return full

    @property
    def longest(self) -> int:
        """Tokens of a document that full attention is to hold."""
        return self.max_length or min(int(self.get("max_position_embeddings") or LONGEST), LONGEST)

    def rope(self, layer_type: str = "full_attention", fraction: float = 1.0) -> dict[str, Any]:
        """`rope_base`, `rope_fraction` and `rope_scaling` of the attention of a type of layer;
        `fraction` where the file does not say how many of a head's channels turn."""
        found = self.get("rope_parameters") or {}
        found = found.get(layer_type, found)
        kind = found.get("rope_type") or found.get("type") or "default"
        kind = "longrope" if "long_factor" in found else kind  # also called su, and once yarn
        if kind not in _SCALINGS:
            raise ModelError(
                f"{CONFIG} asks for the rotary embedding {kind!r}, and those known are "
                f"{', '.join(_SCALINGS)}: take a checkpoint without it."
            )
        return {
            "rope_base": float(found.get("rope_theta") or self.get("rope_theta") or 10_000.0),
            "rope_fraction": float(found.get("partial_rotary_factor") or fraction),
            "rope_scaling": _SCALINGS[kind](found, self),
        }


def read(folder: pathlib.Path) -> tuple[Fields, dict[str, Any]]:
    """The fields of a folder's config.json, and the same as they stand there.

    Raises CheckpointError where it is not JSON, ModelError where it cannot be read.
    """
    try:
        raw = json.loads((folder / CONFIG).read_text("utf-8"))
    except OSError as error:
        raise ModelError(
            f"{folder / CONFIG} cannot be read ({error.strerror}): give a model's folder."
        ) from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{folder / CONFIG} is not JSON: restore the file.") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{folder / CONFIG} is no JSON object: restore the file.")
    if isinstance(raw.get("text_config"), dict):
        outer = {name: raw[name] for name in _OUTER if name in raw}
        raw = {**outer, **raw["text_config"]}
    return normalised(raw), raw


def normalised(raw: dict[str, Any]) -> Fields:
    """Fields under one name each, whatever version of transformers wrote them."""
    fields = Fields({name: value for name, value in raw.items() if value is not None})
    for older, name in _OLDER.items():
        if older in fields:
            fields.setdefault(name, fields[older])
    stated = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(stated, dict):
        raise ModelError(f"{CONFIG} has the rotary parameters {stated!r}: restore the file.")
    older = {
        "rope_theta": fields.get("rope_theta", fields.get("rotary_emb_base")),
        "partial_rotary_factor": fields.get("partial_rotary_factor", fields.get("rotary_pct")),
    }
    full = Fields(fields | {"rope_parameters": older | stated})
    full.nulls = frozenset(raw.keys() - fields.keys())
    return full


#: Fields that say by another name what one of today's says: older ones, and those of GPT-2.
_OLDER = {
    "torch_dtype": "dtype",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
    "activation_function": "hidden_act",
    "layer_norm_epsilon": "layer_norm_eps",
}

#: What stands beside a nested text_config and is said of the whole.
_OUTER = ("tie_word_embeddings", "quantization_config", "dtype", "torch_dtype")


def refuse_quantized(folder: pathlib.Path, raw: dict[str, Any], known: Sequence[str] = ()) -> None:
    """Raise ModelError where the weights are quantized, but by a method of those that are known."""
    quantized = raw.get("quantization_config")
    method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
    if quantized and not (isinstance(quantized, dict) and method in known):
        raise ModelError(
            f"{folder} is quantized ({method!r}), and no quantized file is read here (bitsandbytes,"
            " GPTQ, AWQ, fp8, compressed-tensors and their kin): take the float weights."
        )


def _llama3(rope: dict, fields: Fields) -> Llama3:
    return Llama3(
        factor=rope["factor"],
        length=_trained(rope, fields),
        low=rope["low_freq_factor"],
        high=rope["high_freq_factor"],
    )


def _yarn(rope: dict, fields: Fields) -> Yarn:
    length = _trained(rope, fields)
    factor = rope.get("factor") or fields["max_position_embeddings"] / length
    gain = lambda m: 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0
    m, over = rope.get("mscale"), rope.get("mscale_all_dim")
    return Yarn(
        factor=factor,
        length=length,
        fast=rope.get("beta_fast") or 32.0,
        slow=rope.get("beta_slow") or 1.0,
        truncate=rope.get("truncate", True),
        gain=rope.get("attention_factor") or (gain(m) / gain(over) if m and over else gain(1)),
    )


def _longrope(rope: dict, fields: Fields) -> LongRope:
    length = _trained(rope, fields)
    factor = rope.get("factor") or fields["max_position_embeddings"] / length
    gain = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
    return LongRope(
        short=tuple(rope["short_factor"]),
        long=tuple(rope["long_factor"]),
        length=length,
        max_length=fields.longest,
        gain=rope.get("attention_factor") or gain,
    )


def _trained(rope: dict, fields: Fields) -> int:
    """Tokens of the texts that the model was trained with before they were stretched."""
    stated = rope.get("original_max_position_embeddings")
    return stated or fields.get(
        "original_max_position_embeddings", fields["max_position_embeddings"]
    )


_SCALINGS = {
    "default": lambda rope, fields: None,
    "linear": lambda rope, fields: Linear(factor=rope["factor"]),
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
