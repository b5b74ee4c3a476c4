"""Every mixer of seqlab holds the contract; a new file in `layers/mixers` is tested at once."""

import functools

import pytest

from seqlab import settings
from seqlab.conformance.suite import PROPERTIES, examine, title
from seqlab.conformance.trial import Trial
from seqlab.errors import ConfigError
from seqlab.layers import feature_maps, feature_memory, ffn, norm
from seqlab.layers.registry import mixer_config, own_mixers

SHARDED = "sharded equals one device"  # slow to compile: variants that shard alike leave it out
GRADIENTS = "gradients equal the step form"

#: Configs that take other paths than the defaults.
VARIANTS = {
    "attention": [
        {"window": 12, "sinks": 2, "kv_heads": 2, "qk_norm": norm.Config(), "qkv_bias": True},
        {"qk_norm": norm.Config(), "qk_norm_over": "width", "gate": True, "rope_fraction": 0.5},
    ],
    "delta_net": [
        {"activation": "elu", "qk_norm": "sum", "beta": False, "gate": True, "conv_width": 0},
    ],
    "kda": [{"gate_bias": True, "lowest_decay": -5.0, "negative_eigenvalues": True}],
    "gla": [{"heads": 2, "conv_width": 0, "log_decay_min": -0.04, "gate": False, "chunk_size": 32}],
    "hybrid_attention": [
        {
            "kv_heads": 2,
            "window": 5,
            "sink_logits": 2,
            "cap": 3.0,
            "overlap": False,
            "mix": "joint",
            "memory": feature_memory.Config(
                feature_maps.Config("hedgehog", per_head=True),
                rope="before",
                decay="none",
                norm="own",
            ),
        },
    ],
    "linear_attention": [
        {
            "kv_heads": 2,
            "feature_map": feature_maps.Config("hedgehog", per_head=True),
            "sum_q": True,
            "scale": True,
            "normaliser": False,
            "norm_eps": 1e-6,
        }
    ],
    "zamba2": [
        {
            "inner": mixer_config("gla", heads=2, chunk_size=16),
            "rope_base": None,
            "adapt_attention": False,
            "bias": True,
        }
    ],
    "mla": [{"q_rank": 12, "rope_base": None, "bias": True, "scale": 0.5}],
    "mamba2": [
        {
            "groups": 2,
            "head_dim": 8,
            "heads": 6,
            "bias": True,
            "out_bias": True,
            "conv_bias": False,
            "dt_limit": (1e-2, 0.1),
            "norm": "before_gate",
            "gains": (0.5, 2.0, 0.7, 1.5, 3.0),
            "chunk_size": 32,
        }
    ],
    "gated_conv": [{"expand": 2, "gate_before": False, "silu": True, "bias": True}],
    "slstm": [{"heads": 2, "conv_width": 0}],
    "mamba": [{"norm": "weighted", "bias": True, "conv_bias": False, "dt_rank": 3}],
    "min_gru": [{"expand": 2.0, "positive": False}],
    "ttt": [{"depth": 2, "conv_width": 0, "rope_base": None}],
    "mom": [
        {
            "base": "gated_linear",
            "shared_memory": False,
            "share_q": False,
            "conv_scope": "sequence",
            "gate": False,
        },
        {"base": "ssd", "memories": 3, "top_k": 3, "single_kv_proj": True, "conv_width": 0},
    ],
    "mlgru": [{"output": "paper", "layer": 0}],
    "s5": [{"blocks": 2, "activation": "half_glu2", "clip_eigenvalues": True}],
}
CASES = [(name, {}) for name in own_mixers()]
CASES += [(name, fields) for name in VARIANTS for fields in VARIANTS[name]]


@functools.cache
def trial(name: str, fields: tuple) -> Trial:
    return Trial(mixer_config(name, **dict(fields)))


def _called(case) -> str:
    name, fields = case
    return ",".join([name, *(f"{key}={value}" for key, value in fields.items())])


def _param(case):
    return pytest.param(case, id=_called(case))


@pytest.mark.parametrize("prove", PROPERTIES, ids=title)
@pytest.mark.parametrize("case", [_param(case) for case in CASES])
def test_mixer_has_the_property(case, prove):
    name, fields = case
    if fields and "window" not in fields and title(prove) == SHARDED:
        pytest.skip("its default config shards alike")
    row = examine(prove, trial(name, tuple(fields.items())))
    assert row.passed, f"{row.note} (error {row.error}, allowed {row.allowed})"
    if row.property == GRADIENTS:
        assert row.allowed < 1e-9, f"not in float64: {row.note}"


@pytest.mark.parametrize(
    "name, numbers",
    [
        ("linear_attention", "heads kv_heads expand_k expand_v eps norm_eps chunk_size"),
        ("retnet", "heads expand_k expand_v rope_base conv_width norm_eps chunk_size"),
        ("lightning", "heads head_dim layer layers norm_eps chunk_size"),
        ("hgrn2", "key_dim layer layers norm_eps chunk_size"),
        ("mlstm", "heads expand_k expand_v gate_cap norm_eps eps layers chunk_size"),
        ("mlstm_block", "heads expand multiple_of conv_width block eps norm_eps chunk_size"),
        ("rwkv6", "heads expand_k expand_v mix_rank decay_rank norm_eps layer layers chunk_size"),
        ("rwkv6_channel_mix", "ratio width layer layers"),
        ("delta_net", "heads expand_k expand_v conv_width norm_eps chunk_size"),
        (
            "gated_delta_net",
            "key_heads value_heads key_dim value_dim conv_width norm_eps dt_min dt_max chunk_size",
        ),
        ("kda", "heads key_dim value_dim conv_width rank norm_eps dt_min dt_max chunk_size"),
        ("rwkv7", "heads layer layers decay_rank rate_rank value_rank gate_rank norm_eps"),
        ("rwkv7_channel_mix", "ratio width layer layers"),
        ("mla", "heads kv_rank q_rank nope_dim rope_dim v_dim max_length rope_base scale"),
        ("gla", "heads expand_k expand_v conv_width decay_rank decay_temperature chunk_size"),
        (
            "mamba2",
            "head_dim heads d_state groups expand conv_width dt_min dt_max norm_eps chunk_size",
        ),
        ("slstm", "heads conv_width depth"),
        ("mamba", "d_state expand width conv_width dt_rank dt_min dt_max norm_eps chunk_size"),
        ("rg_lru", "width heads conv_width c gate_scale"),
        ("s5", "d_state blocks dt_min dt_max"),
        ("aaren", "heads"),
        (
            "mom",
            "memories top_k heads key_dim value_dim conv_width norm_eps aux_scale chunk_size",
        ),
        ("min_gru", "expand"),
        ("min_lstm", "expand"),
        ("mlgru", "layer layers norm_eps"),
        ("gated_conv", "conv_width expand"),
        ("base_conv", "conv_width"),
        ("prefix_linear_attention", "prefix_len heads key_dim expand eps chunk_size"),
        ("rwkv4", "width layer layers"),
        ("rwkv4_channel_mix", "width layer layers"),
        ("lstm", "heads"),
        ("gru", "heads"),
        ("elman", "heads"),
        ("attention", "heads kv_heads head_dim window max_length rope_base"),
        ("hybrid_attention", "heads kv_heads window sinks sink_logits window_share rope_base cap"),
        ("learned_positions", "max_length std"),
        ("titans_lmm", "heads depth expand conv_width max_inner_lr norm_eps chunk_size"),
        ("titans_mac", "heads persistent rope_base norm_eps"),
        ("titans_mag", "norm_eps"),
        ("titans_mal", "norm_eps"),
        ("ttt", "heads depth expand base_lr conv_width rope_base norm_eps chunk_size"),
    ],
)
@pytest.mark.parametrize("wrong", [-1, float("nan"), float("inf")])
def test_a_number_that_makes_no_sense_is_refused_by_name(name, numbers, wrong):
    for field in numbers.split():
        with pytest.raises(ConfigError, match=field):
            mixer_config(name, **{field: wrong})


@pytest.mark.parametrize("field", ["ratio", "multiple_of"])
@pytest.mark.parametrize("wrong", [-1, 0, float("nan"), float("inf")])
def test_an_ffn_that_makes_no_sense_is_refused_by_name(field, wrong):
    with pytest.raises(ConfigError, match=field):
        settings.read(ffn.Config, {field: wrong})
