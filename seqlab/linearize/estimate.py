"""What a linearization changes, trains and needs: known before any weight is read."""

import math
import pathlib
from collections.abc import Sequence

import jax
from flax import nnx
from pydantic.dataclasses import dataclass

from seqlab.linearize import room, stage
from seqlab.linearize.recipes import Stage
from seqlab.linearize.swap import Pair, Plan, written_out
from seqlab.models import layout, store
from seqlab.models.parameters import parameters
from seqlab.models.summary import parameter_count
from seqlab.settings import STRICT

FLOAT32 = 4  # bytes
TRAINING = 4  # numbers that memory holds of one that trains: itself, its gradient, two moments


@dataclass(frozen=True, config=STRICT)
class Estimate:
    """Bytes are of a sequence, of a token, or of all.

    layers        how many the model has; `replaced` are those that change
    parameters    of the teacher; `added` are what the student has beside the teacher's weights
    trained       numbers that each stage trains
    state_bytes   what the replaced layers remember of a sequence, whatever its length
    cache_bytes   what the same layers of the teacher remember of each token
    weight_bytes  of the teacher, as it is stored
    left          weights of the teacher's attention that have no place in the student
    memory_bytes  of weights, gradients and moments in the largest stage; activations come on top
    disk_bytes    of the stages' checkpoints and the student
    student_bytes of the student, as it is stored
    """

    layers: int
    replaced: tuple[int, ...]
    parameters: int
    added: int
    trained: tuple[int, ...]
    state_bytes: int
    cache_bytes: int
    weight_bytes: int
    left: tuple[str, ...] = ()

    @property
    def break_even(self) -> int:
        """Tokens from which on the student's layers remember in fewer bytes than the teacher's."""
        return math.floor(self.state_bytes / self.cache_bytes) + 1

    @property
    def student_bytes(self) -> int:
        return self.weight_bytes + FLOAT32 * self.added

    @property
    def memory_bytes(self) -> int:
        return self.student_bytes + FLOAT32 * TRAINING * max(self.trained, default=0)

    @property
    def disk_bytes(self) -> int:
        return self.student_bytes + room.checkpoints(self.trained)


def estimate(plan: Plan, stages: Sequence[Stage], teacher: pathlib.Path) -> Estimate:
    """What a swap and the stages after it come to, of a teacher in a folder."""
    student = plan.student.skeleton()
    held, added = plan.teacher.skeleton(), plan.extra
    sizes = {name: array.size for name, array in parameters(student).items()}
    pair = Pair(held, student, plan.replaced, plan.extra)
    return Estimate(
        layers=len(layout.layers(plan.teacher)),
        replaced=plan.replaced,
        parameters=parameter_count(held),
        added=sum(sizes[name] for name in added),
        trained=tuple(_trained(pair, one) for one in stages),
        state_bytes=_state(plan),
        cache_bytes=_cache(plan),
        weight_bytes=_stored(teacher) or FLOAT32 * parameter_count(held),
        left=tuple(sorted(plan.left)),
    )


def _trained(pair: Pair, one: Stage) -> int:
    student = jax.eval_shape(lambda student: stage.adapted(student, one), pair.student)
    sizes = {name: array.size for name, array in parameters(student).items()}
    return sum(sizes[name] for name in stage.trained(pair, student, one))


def _state(plan: Plan) -> int:
    blocks, d_model = layout.layers(plan.student), plan.student.d_model
    empty = lambda mixer: mixer.build(d_model, rngs=nnx.Rngs(0)).init_state(1)
    states = [jax.eval_shape(lambda m=blocks[n].mixer: empty(m)) for n in plan.replaced]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(states))


def _cache(plan: Plan) -> int:
    """Keys and values are held in float32."""
    blocks, config = layout.layers(plan.teacher), plan.teacher
    sized = [written_out(blocks[n].mixer, config.d_model) for n in plan.replaced]
    return sum(2 * FLOAT32 * one.kv_heads * one.head_dim for one in sized)


def _stored(teacher: pathlib.Path) -> int:
    """Bytes of the weights' files; 0 for a run, whose checkpoints hold more than weights."""
    return sum(file.stat().st_size for file in store.home(teacher).glob("*.safetensors"))
