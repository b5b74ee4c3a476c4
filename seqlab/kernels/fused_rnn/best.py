"""What `implementation` None means: a form for each platform, under one gradient."""

from seqlab.kernels import platforms
from seqlab.kernels.fused_rnn import pallas_gpu, pallas_tpu, xla


def by_platform(wx, reset, R, bias, state, *, cell):
    """The definition's arguments and results: kernels where they suit, and `xla` elsewhere."""
    tokens = wx, reset, R, bias
    on_tpu = pallas_tpu.OnTPU(cell) if pallas_tpu.blocks_of(wx, R, state) else None
    forms = platforms.Forms(xla.InXLA(cell), tpu=on_tpu, gpu=pallas_gpu.form(tokens, cell))
    return platforms.scan(forms, tokens, tuple(state))
