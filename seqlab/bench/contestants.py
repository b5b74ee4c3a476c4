"""What takes part in a race: those that can be built and run here; the others are left out, with
the reason."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

from seqlab import settings
from seqlab.bench.record import LEFT_OUT, Row
from seqlab.errors import SeqlabError

#: What something may raise that cannot run here; anything else is a mistake of ours.
CANNOT = (SeqlabError, NotImplementedError, jax.errors.JaxRuntimeError)


C = TypeVar("C", bound=Any)  # has its `work`


def gather(
    makers: Mapping[str, Callable[[], C]], about: Callable[[str], Row]
) -> tuple[dict[str, C], list[Row]]:
    """Make each and run it once. `about` is the beginning of its row, which ends with the reason
    where it is left out."""
    made, absent = {}, []
    for name, make in makers.items():
        try:
            one = make()
            one.work()
            made[name] = one
        except CANNOT as error:
            absent.append({**about(name), LEFT_OUT: settings.raised(error)})
    return made, absent


def size_of(tree: Any) -> int:
    """Bytes of arrays, which may be abstract."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
