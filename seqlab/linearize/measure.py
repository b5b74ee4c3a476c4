"""What is measured of a teacher and its students: all of them on the same held-out rows."""

import collections
import math
from collections.abc import Callable, Iterable
from typing import Any

from seqlab.errors import ModelError
from seqlab.linearize import losses
from seqlab.linearize.record import Figures
from seqlab.linearize.swap import Pair
from seqlab.linearize.transfer import Models, layer
from seqlab.models.lm import LM
from seqlab.models.parameters import parameters
from seqlab.train.corpus import Batch
from seqlab.train.objective import NEXT_TOKEN, Asked
from seqlab.train.state import place
from seqlab.train.step import Loss, make_evaluation

LOGITS = 2**26  # numbers in the logits of a batch, at most: 256 MB


def batch_size(vocab: int, length: int, devices: int) -> int:
    """Rows of a batch whose logits are few enough, a multiple of the devices that share them."""
    return devices * max(1, min(8, LOGITS // (vocab * length)))


class Judge:
    """Measures models; those of one config are measured by one compiled program."""

    def __init__(self, batches: Iterable[Batch], mesh: Any, recall: Callable[[LM], dict]):
        """`recall` says of a model what share it recalls by the distance, as `Figures` has it."""
        self.batches, self.mesh, self.recall = batches, mesh, recall
        self._programs: dict[Any, Callable] = {}

    def teacher(self, model: LM) -> Figures:
        """Of a model alone."""
        return self._figures(Models(None, model), losses.ce)

    def student(self, pair: Pair, tokens: int = 0) -> Figures:
        """Of a pair's student, which was trained on so many tokens, beside its teacher."""
        return self._figures(Models(pair.teacher, pair.student), _beside, tokens)

    def _figures(self, models: Models, loss: Callable, tokens: int = 0) -> Figures:
        key = loss, *(model and model.config for model in models)
        if key not in self._programs:
            skeleton: Any = Models(*(model and model.config.skeleton() for model in models))
            self._programs[key] = make_evaluation(skeleton, NEXT_TOKEN.ask, loss)
        sums, params = collections.Counter(), parameters(models)
        for batch in self.batches:
            found = self._programs[key](params, place(batch, self.mesh))
            sums.update({"loss": float(found.nats), "tokens": float(found.tokens)})
            sums.update({name: float(value) for name, value in found.seen.items()})
        mean = sums["loss"] / sums["tokens"]
        if not math.isfinite(mean):
            raise ModelError("The model's logits are not numbers: its weights are damaged.")
        transfer = {
            int(name.rpartition("_")[2]): value / sums["tokens"]
            for name, value in sums.items()
            if name.startswith("layer_")
        }
        return Figures(mean, transfer, self.recall(models.student), tokens)


def _beside(models: Models, asked: Asked) -> Loss:
    """The student's cross-entropy, and beside it each layer's error."""
    return losses.ce(models, asked)._replace(seen=layer(models, asked).seen)
