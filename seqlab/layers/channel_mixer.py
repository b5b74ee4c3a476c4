"""What may stand at the second place of a block, by kind: a perceptron, a mixture of them, or a
mixer with a state.

RWKV's channel mix looks one token back, so it is a mixer like any other.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator

from seqlab import settings
from seqlab.errors import ConfigError, nearest
from seqlab.layers import ffn, moe, registry

KINDS = {"mlp": ffn.Config, "moe": moe.Config}


def _from_plain(value: Any) -> Any:
    if not isinstance(value, Mapping):
        if not hasattr(value, "build"):
            raise ValueError(f"{value!r} is not a channel mixer's config: use ffn.Config(...)")
        return value
    if "mixer" in value:
        return registry.from_plain(value)
    fields = {str(name): field for name, field in value.items()}
    kind = fields.pop("ffn", "mlp")
    if kind not in KINDS:
        raise ConfigError(f"There is no ffn {kind!r}: {nearest(str(kind), KINDS)}")
    return settings.read(KINDS[kind], fields, where="ffn")


def _to_plain(config: Any) -> dict:
    for kind, config_class in KINDS.items():
        if type(config) is config_class:
            return {"ffn": kind, **settings.plain(config)}
    return registry.to_plain(config)


#: A channel mixer's Config as a field: `{"ffn": kind, ...}`, or `{"mixer": name, ...}`, in JSON.
ChannelMixerConfig = Annotated[Any, PlainValidator(_from_plain), PlainSerializer(_to_plain)]
