"""The tokenizer of a published model: its start token, all that ends its texts, its template."""

import hashlib
import json
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

from seqlab.errors import CheckpointError, DataError, ModelError
from seqlab.models import chat, pretrained
from seqlab.models.tokenizer import FileTokenizer

TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
GENERATION = "generation_config.json"
TEMPLATE = "chat_template.jinja"
#: What travels with a model.
FILES = (
    TOKENIZER,
    SETTINGS,
    GENERATION,
    TEMPLATE,
    "chat_template.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
LARGEST = 10 * 2**20  # bytes of a file of settings


class PublishedTokenizer(FileTokenizer):
    """A folder's tokenizer.json, and what the files beside it say about its special tokens."""

    def __init__(self, folder: pathlib.Path):
        if not (folder / TOKENIZER).is_file():
            raise ModelError(
                f"{folder} has no {TOKENIZER}: load its tokenizer once with transformers "
                "(AutoTokenizer) and save it there with save_pretrained."
            )
        super().__init__(folder)
        settings, generation, config = (
            _read(folder / n) for n in (SETTINGS, GENERATION, "config.json")
        )
        self.specials = _specials(settings)
        self.template = _template(folder, settings)
        ids = self._tokenizer.token_to_id
        own = ids(self.specials.get("eos_token", ""))
        ours = config.get("model")
        config = (ours.get("published") or {}) if isinstance(ours, dict) else config
        stated = (generation.get("eos_token_id"), config.get("eos_token_id"), own)
        ends = next((end for end in stated if end is not None), [])
        ends = [i for i in (ends if isinstance(ends, list) else [ends]) if type(i) is int]
        self.stops = tuple(ends)
        self.stop = ends[0] if ends else None
        self.start = self._begin(settings, ids(self.specials.get("bos_token", "")))
        told = json.dumps([self.fingerprint, self.stops, self.start])
        self.fingerprint = hashlib.sha256(told.encode()).hexdigest()

    def _begin(self, settings: dict, bos: int | None) -> tuple[int, ...]:
        """The ids that stand before a text: those its tokenizer.json adds, else as settings say."""
        added = self._tokenizer.encode("a")
        first = added.special_tokens_mask.index(0) if 0 in added.special_tokens_mask else 0
        if not first and settings.get("add_bos_token") is True and bos is not None:
            return (bos,)
        return tuple(added.ids[:first])

    def chat(self, messages: Sequence[chat.Message]) -> list[int]:
        """The ids of a conversation, up to where the model answers.

        messages: dicts of "role" ("system", "user", "assistant") and "content". Raises ModelError
        where the model has no chat template or its template refuses them, DataError where a
        message spells a special token.
        """
        if self.template is None:
            raise ModelError("This model has no chat template: give its prompt without --chat.")
        marks = {
            t.content for t in self._tokenizer.get_added_tokens_decoder().values() if t.special
        }
        for message in messages:
            spelled = [mark for mark in marks if mark in message["content"]]
            if spelled:
                raise DataError(
                    f"A message holds {min(spelled)!r}, which the model takes for the end of a "
                    "turn or the like: leave it out."
                )
        text = chat.render(self.template, messages, self.specials)
        self._tokenizer.encode_special_tokens = False  # the template's marks are marks
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        finally:
            self._tokenizer.encode_special_tokens = True


def belongs(folder: pathlib.Path) -> bool:
    """Whether the tokenizer in a folder is a published model's: the folder is one, or holds a model
    that was read from one."""
    ours = _read(folder / "config.json").get("model")
    own = (folder / SETTINGS).is_file() or pretrained.is_published(folder)
    return own or bool(isinstance(ours, dict) and ours.get("published"))


def copy(source: pathlib.Path, destination: pathlib.Path) -> None:
    """Copy a folder's tokenizer, and what belongs to it, into another."""
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)


def _read(path: pathlib.Path) -> dict[str, Any]:
    """A JSON file beside the tokenizer; empty where there is none."""
    text = _text(path)
    try:
        found = {} if text is None else json.loads(text)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is not JSON: restore the file.") from None
    return found if isinstance(found, dict) else {}


def _text(path: pathlib.Path) -> str | None:
    """The text of a file beside the tokenizer; None where there is none."""
    try:
        if path.stat().st_size > LARGEST:
            raise CheckpointError(f"{path} is far larger than such files are: restore the file.")
        return path.read_text("utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}): mend it.") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} is not UTF-8: restore the file.") from None


def _specials(settings: dict[str, Any]) -> dict[str, str]:
    """`{"bos_token": "<s>", ...}`; files have a string, or an object with its `content`."""
    found = {}
    for name, value in settings.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            found[name] = content
    return found


def _template(folder: pathlib.Path, settings: dict[str, Any]) -> str | None:
    """The chat template: a file of its own in newer folders, a field in older ones."""
    own = _text(folder / TEMPLATE)
    if own is not None:
        return own
    for holder in (settings, _read(folder / "chat_template.json")):
        template = holder.get("chat_template")
        if isinstance(template, list):
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default")
        if isinstance(template, str):
            return template
    return None
