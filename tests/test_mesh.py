"""Meshes: where weights go, and what cannot be a mesh."""

import jax
import pytest

from seqlab.errors import ConfigError
from seqlab.parallel.mesh import constrain, current_travel, make_mesh, use_mesh, weight_sharding


def test_weights_are_split_by_their_named_axes():
    mesh = make_mesh(data=2, seq=2, model=2)
    spec = lambda shape, axes: weight_sharding(shape, axes, mesh).spec
    assert spec((8, 6), ("embed", "heads")) == jax.P("data", "model")
    assert spec((3, 8, 6), ("embed", "heads")) == jax.P(None, "data", "model")  # stacked layers
    assert spec((8, 7), ("embed", "heads")) == jax.P("data", None)  # 7 heads on 2 devices
    assert spec((4,), (None,)) == jax.P(None)


def test_a_mesh_that_cannot_be_is_one_sentence():
    with pytest.raises(ConfigError, match="needs 16 devices but this machine has 8"):
        make_mesh(data=4, seq=4)
    with pytest.raises(ConfigError, match="seq=0 x model=1 has an axis below 1"):
        make_mesh(seq=0)
    with pytest.raises(ConfigError, match="did you mean 'ring'"), use_mesh(strategy="rnig"):
        pass


def test_outside_a_mesh_nothing_is_asked():
    x = jax.numpy.ones((4, 6))
    assert constrain(x, "data", "seq") is x
    with use_mesh(data=2, seq=2, strategy="ring"):
        assert current_travel().strategy == "ring"
        split = jax.jit(lambda x: constrain(x, "data", "seq"))(x)
        assert split.sharding.spec == jax.P("data", "seq")
    assert current_travel().strategy == "all_gather"
