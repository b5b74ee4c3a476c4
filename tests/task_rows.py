"""Examples of a task as plain lists, for tests that read them token by token."""

import numpy as np

from seqlab.tasks import IGNORE, task_config


def rows(name, count=64, seed=3, **fields):
    """Examples of a task as lists of ints, one pair (inputs, {position: label}) a row."""
    inputs, labels = task_config(name, **fields).examples(count, seed)
    asked = [{t: row[t] for t in np.flatnonzero(row != IGNORE).tolist()} for row in labels]
    return list(zip(inputs.tolist(), asked, strict=True))
