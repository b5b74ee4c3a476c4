"""What a kernel's backward pass needs, under a name that a policy of `jax.checkpoint` can save.

Recomputing elementwise work in a backward pass is cheap; running a kernel again is not. So every
kernel with a gradient of its own marks its outputs and the states it keeps.
"""

import jax
from jax.ad_checkpoint import checkpoint_name

KEPT = "kernel"


def kept(tree):
    """The tree, each array marked as worth its memory."""
    return jax.tree.map(lambda a: checkpoint_name(a, KEPT), tree)
