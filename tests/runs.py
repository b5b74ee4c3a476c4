"""A run small enough to be made many times: one mixer, short rows, a few small files."""

import json
import pathlib

import jax

from seqlab.layers.mixers import gla, min_gru
from seqlab.models import lm
from seqlab.models.arrays import read_arrays, read_contents
from seqlab.train.config import Checkpoint, Config, Optimizer, Track
from seqlab.train.data import Data
from seqlab.train.sources import Text

TIMING = {"tokens_per_second", "data_wait", "seconds"}


def write_texts(folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir(parents=True)
    for i in range(8):
        words = f"cat {i} sat on mat {7 * i} and thought of {i * i} mice. " * (4 + 3 * i)
        (folder / f"{i}.txt").write_text(words)
    return folder


def write_tokenizer(folder: pathlib.Path) -> pathlib.Path:
    """A small tokenizer.json: byte-level BPE that asks for truncation, and knows an end mark."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<unk>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["the cat sat on the mat, the end"] * 3, trainer)
    bpe.enable_truncation(4)
    bpe.save(str(folder / "tokenizer.json"))
    return folder


def tiny(texts: pathlib.Path, **fields) -> Config:
    """With a constant rate after the warm-up, so that runs of all lengths are one program."""
    text = Text((f"{texts}/*.txt",), name="cats")
    data = Data(train=(text,), held_out=(text,), held_out_rows=4, length=32, batch=4)
    model = lm.Config(vocab=257, d_model=32, pattern=(gla.Config(heads=2, chunk_size=16),))
    return Config(
        **{
            "model": model,
            "data": data,
            "steps": 40,
            "optimizer": Optimizer(schedule="constant", warmup=20),
            "checkpoint": Checkpoint(every=5),
            "evaluate_every": 10,
            "track": Track(tensorboard=False),
        }
        | fields
    )


def quick(texts: pathlib.Path, **fields) -> Config:
    """The same of a mixer that is traced and compiled in a third of the time."""
    model = lm.Config(vocab=257, d_model=32, pattern=(min_gru.Config(),))
    return tiny(texts, **{"model": model} | fields)


def rows(folder: pathlib.Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING} for line in lines]


def losses(folder: pathlib.Path) -> list[float]:
    return [row["loss"] for row in rows(folder) if "loss" in row]


def stored(folder: pathlib.Path, step: int) -> tuple[dict[str, bytes], dict]:
    """The bytes of every array of a step, and its metadata."""
    path = folder / "checkpoints" / str(step)
    contents = read_contents(path)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=here)
        for name, (dtype, shape) in contents["arrays"].items()
    }
    arrays = jax.device_get(read_arrays(path, like))
    return {name: array.tobytes() for name, array in arrays.items()}, contents["metadata"]
