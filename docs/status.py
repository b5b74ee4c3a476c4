"""The tables of README.md, checkpoints.md and tasks.md, from the code itself.

    python docs/status.py

writes them anew between their markers, holding every mixer to the contract on the way (about ten
seconds a mixer). A test compares the tables with the code.
"""

import ast
import dataclasses
import importlib
import os
import pathlib
import sys
from collections.abc import Callable, Mapping

import jax
from flax import nnx

from seqlab import settings
from seqlab.conformance.suite import PROPERTIES, check, title
from seqlab.kernels.recurrence import RECURRENCES
from seqlab.layers.registry import mixer_config, own_mixers
from seqlab.models.pretrained import model_types
from seqlab.tasks import protocols, task_config, tasks

README = pathlib.Path(__file__).parent.parent / "README.md"
CHECKPOINTS = pathlib.Path(__file__).parent / "checkpoints.md"
TASKS = pathlib.Path(__file__).parent / "tasks.md"
D_MODEL = 64  # of the state bytes; heads and sizes are the defaults of each Config

#: What a column promises, and the properties that prove it.
FEATURES = {
    "chunks, pieces, steps agree": ("pieces equal the whole", "gradients equal the step form"),
    "causal": ("future is not seen", "rows are independent"),
    "packing": ("packed documents equal separate ones", "documents do not leak"),
    "left padding": ("left padding is forgotten",),
    "bf16": ("bfloat16 keeps a float32 state", "extreme inputs stay finite"),
    "data x seq x model": ("sharded equals one device",),
}
OWN = "no kernel"  # of mixers that shift tokens, or look positions up
BESIDE = "precision", "experts", "decay", "soft_cap", OWN  # what a kernel family may stand beside
SPLIT = ("routed",)  # not a recurrence of its own, and has a transition all the same
Verdicts = Callable[[str], Mapping[str, bool | None]]  # of a mixer's name: property -> verdict


def table(verdicts: Verdicts) -> str:
    """One row a mixer, in Markdown."""
    head = ["mixer", "kernel", "its forms", "state bytes", "longest document", *FEATURES]
    rows = [[name, *_facts(name), *_marks(verdicts(name))] for name in own_mixers()]
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def measured(name: str) -> dict[str, bool | None]:
    """The verdicts of `seqlab.check`."""
    report = check(mixer_config(name))
    print(report.table() if sys.stdout.isatty() else str(report), flush=True)
    return {row.property: row.passed for row in report.rows}


def promised(name: str) -> dict[str, bool | None]:
    """What tests/test_mixers.py holds every mixer to: all of it."""
    return {title(prove): True for prove in PROPERTIES}


def families() -> str:
    """One row a file of published families, in Markdown."""
    modules = sorted({m.__name__: m for m in model_types().values()}.items())
    about = lambda module: str(module.__doc__).split("\n\n")[0].replace("\n", " ").strip()
    types = lambda module: ", ".join(f"`{kind}`" for kind in module.MODEL_TYPES)
    rows = "".join(f"| {types(module)} | {about(module)} |\n" for _, module in modules)
    return "| `model_type` | |\n| --- | --- |\n" + rows


def replaced(text: str, new: str, name: str = "status", by: str = "docs/status.py") -> str:
    """`text` with what is between the markers of this name, which say what writes it, replaced."""
    begin, end = f"<!-- {name}: python {by} -->\n", f"<!-- end of {name} -->\n"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return before + begin + new + end + after


def task_table() -> str:
    """What each task asks, its fields with their defaults, and its protocols."""
    rows = ["| task | what it asks | fields | protocols |", "| --- | --- | --- | --- |"]
    for name in tasks():
        config = task_config(name)
        module = sys.modules[type(config).__module__]
        asks = str(module.__doc__).partition("\n")[0].rstrip(".")
        fields = ", ".join(f"`{field}={value}`" for field, value in settings.plain(config).items())
        known = dict.fromkeys(
            "mad_FIELD_VALUE" if p.startswith("mad_") else p for p in protocols(name)
        )
        rows.append(f"| `{name}` | {asks} | {fields} | {', '.join(f'`{p}`' for p in known)} |")
    return "\n".join(rows) + "\n"


def _facts(name: str) -> list[str]:
    config = mixer_config(name)
    mixer = jax.eval_shape(lambda: config.build(D_MODEL, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(jax.eval_shape(lambda: mixer.init_state(1)))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    kernel = _kernel(type(config).__module__)
    longest = "`max_length`" if mixer.max_length else "no limit"
    if mixer.max_length and hasattr(config, "window"):
        windowed = dataclasses.replace(config, window=8).build(D_MODEL, rngs=nnx.Rngs(0))
        longest += "" if windowed.max_length else "; with a window no limit"
    return [f"`{kernel}`", _forms(kernel), f"{size:,}", longest]


def _kernel(module: str) -> str:
    """The kernel family that a mixer's file imports, or a layer that it is made of."""
    source = pathlib.Path(str(importlib.import_module(module).__file__)).read_text("utf-8")
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    names = [(node.module or "").split(".") for node in nodes]
    families = [n[2] for n in names if n[:2] == ["seqlab", "kernels"] and len(n) == 3]
    layers = [".".join(n) for n in names if n[:2] == ["seqlab", "layers"] and len(n) == 3]
    whole = [node for node in nodes if node.module == "seqlab.layers"]
    layers += [f"seqlab.layers.{alias.name}" for node in whole for alias in node.names]
    found = [f for f in (*families, *map(_kernel, layers)) if f not in BESIDE]
    return min(found, key=lambda family: family == "short_conv", default=OWN)  # it comes on top


def _forms(kernel: str) -> str:
    """The definition and its faster forms: a file of the family each."""
    folder = pathlib.Path(__file__).parent.parent / "seqlab" / "kernels" / kernel
    files = [f for f in ("xla", "pallas_tpu", "pallas_gpu") if (folder / f"{f}.py").exists()]
    across = ["transition"] if kernel in (*RECURRENCES, *SPLIT) else []
    if kernel in RECURRENCES and RECURRENCES[kernel].transition is None:
        across = ["relay"]
    return ", ".join(["definition", *files, *across])


def _marks(verdicts: Mapping[str, bool | None]) -> list[str]:
    proofs = [[verdicts[name] for name in names] for names in FEATURES.values()]
    return ["yes" if all(p) else "no" if False in p else "not tried" for p in proofs]


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    pages = replaced(CHECKPOINTS.read_text("utf-8"), families(), "families")
    CHECKPOINTS.write_text(pages, "utf-8")
    TASKS.write_text(replaced(TASKS.read_text("utf-8"), task_table(), "tasks"), "utf-8")
    README.write_text(replaced(README.read_text("utf-8"), table(measured)), "utf-8")
