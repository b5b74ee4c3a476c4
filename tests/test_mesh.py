"""Meshes: where weights and devices go, and what cannot be a mesh."""

from typing import NamedTuple

import jax
import numpy as np
import pytest

from seqlab.errors import ConfigError
from seqlab.parallel.mesh import constrain, current_travel, make_mesh, use_mesh, weight_sharding
from seqlab.parallel.torus import laid, snake


def test_weights_are_split_by_their_named_axes():
    mesh = make_mesh(data=2, seq=2, model=2)
    spec = lambda shape, axes: weight_sharding(shape, axes, mesh).spec
    assert spec((8, 6), ("embed", "heads")) == jax.P("data", "model")
    assert spec((3, 8, 6), ("embed", "heads")) == jax.P(None, "data", "model")  # stacked layers
    assert spec((8, 7), ("embed", "heads")) == jax.P("data", None)  # 7 heads on 2 devices
    assert spec((4,), (None,)) == jax.P(None)


def test_a_mesh_that_cannot_be_is_one_sentence():
    with pytest.raises(ConfigError, match="needs 32 devices but this machine has 16"):
        make_mesh(data=8, seq=4)
    with pytest.raises(ConfigError, match="seq=0 x model=1 has an axis below 1"):
        make_mesh(seq=0)
    with pytest.raises(ConfigError, match="did you mean 'ring'"), use_mesh(strategy="rnig"):
        pass


@pytest.mark.parametrize(
    "options, said",
    [
        ({"strategy": "window"}, "'window' needs hops"),
        ({"strategy": "window", "hops": 8}, "hops=8 must lie between 1 and 7 on 8 devices"),
        ({"strategy": "two_level", "row": 3}, "row=3 devices do not make up the 8 devices"),
        ({"strategy": "all_scan", "blocks": 0}, "cannot be cut in blocks=0"),
        ({"attention": "gather"}, "did you mean 'gather_kv'"),
    ],
)
def test_a_way_to_travel_that_cannot_be_is_one_sentence(options, said):
    with pytest.raises(ConfigError, match=said), use_mesh(seq=8, **options):
        pass


class Chip(NamedTuple):
    coords: tuple[int, ...]
    core_on_chip: int = 0


def chips(*shape, cores=1):
    return [Chip(at, core) for at in np.ndindex(*shape) for core in range(cores)]


def hops(devices):
    return [
        int(np.abs(np.subtract(a.coords, b.coords)).sum())
        for a, b in zip(devices, devices[1:], strict=False)
    ]


@pytest.mark.parametrize("shape", [(4, 4), (8, 8), (4, 4, 4), (3, 5)])
def test_a_sequence_lies_on_a_torus_as_a_snake(shape):
    path = snake(chips(*shape))
    assert sorted(path) == chips(*shape)
    assert set(hops(path)) == {1}
    assert sorted(hops(snake(chips(*shape, cores=2)))) == [0] * len(path) + [1] * (len(path) - 1)


def test_with_other_axes_a_sequence_still_goes_from_neighbour_to_neighbour():
    for data, seq, model in ((1, 4, 4), (2, 8, 1), (2, 4, 2)):
        grid = laid(chips(4, 4), data, seq, model)
        assert sorted(grid.flat) == chips(4, 4)
        assert {h for d in grid for m in range(model) for h in hops(list(d[:, m]))} == {1}
    assert {h for line in laid(chips(4, 4), 1, 4, 4)[0] for h in hops(list(line))} == {1}


def test_devices_that_do_not_say_where_they_are_keep_their_order():
    assert snake(jax.devices()) == jax.devices()
    assert list(make_mesh(seq=4).devices.flat) == jax.devices()[:4]


def test_outside_a_mesh_nothing_is_asked():
    x = jax.numpy.ones((4, 6))
    assert constrain(x, "data", "seq") is x
    with use_mesh(data=2, seq=2, strategy="ring"):
        assert current_travel().strategy == "ring"
        split = jax.jit(lambda x: constrain(x, "data", "seq"))(x)
        assert split.sharding.spec == jax.P("data", "seq")
    assert current_travel().strategy == "all_gather"
