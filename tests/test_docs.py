"""Every block of README.md and docs/ does what it says.

```python            is run, in order, with the names of the blocks before it
```python NAME.py    is written to a file of that name
```bash              is run line by line, `seqlab` in this process
```console           has `$ seqlab ...` lines, whose options and arguments are checked
"""

import contextlib
import pathlib
import re
import runpy
import shlex
import subprocess
import sys
from typing import NamedTuple

import pytest
import typer

from docs import status
from seqlab import cli
from seqlab.conformance import suite
from seqlab.layers import registry

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"python", "bash", "console", "text"}


class Code(NamedTuple):
    language: str
    file: str  # the name to write it to; empty to run it
    line: int  # of the page, where it begins
    text: str


def blocks(page: pathlib.Path) -> list[Code]:
    text = page.read_text("utf-8")
    assert text.count("\n```") % 2 == 0, f"{page} has a fence that is not closed"
    fence = re.compile(r"^```(\w+) ?(\S*)\n(.*?)^```$", re.M | re.S)
    found = [Code(m[1], m[2], text[: m.start(3)].count("\n"), m[3]) for m in fence.finditer(text)]
    assert len(found) == text.count("\n```") // 2, f"{page} has a fence without a language"
    return found


def name_of(page: pathlib.Path) -> str:
    return page.name


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory, whose modules and mixers are forgotten in the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_brought", dict(registry._brought))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_of_a_page_runs(page, folder, monkeypatch):
    # the whole suite takes a while and is run by the tests of the mixers
    monkeypatch.setattr(suite, "PROPERTIES", suite.PROPERTIES[1:3])
    names: dict = {}
    for block in blocks(page):
        assert block.language in LANGUAGES, block
        if block.language == "python" and block.file:
            pathlib.Path(block.file).write_text(block.text)
        elif block.language == "python":
            script = folder / f"{page.stem}_line_{block.line}.py"
            script.write_text("\n" * block.line + block.text)  # tracebacks name the page's lines
            names = runpy.run_path(str(script), names)
            script.unlink()
        elif block.language == "bash":
            for line in filter(None, block.text.replace("\\\n", " ").splitlines()):
                assert succeeds(line, monkeypatch), f"{page.name}: {line}"


def succeeds(line: str, monkeypatch) -> bool:
    """Whether a line of bash ends as it should; `seqlab` would take longer to start than to run."""
    command, _, out = line.partition(" > ")
    words = shlex.split(command, comments=True)
    refused = words[0] == "!"
    if words[refused] != "seqlab":
        return subprocess.run(["bash", "-c", line]).returncode == 0
    monkeypatch.setattr(sys, "argv", words[refused:])
    with contextlib.ExitStack() as stack:
        if out:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(out, "w"))))
        end = stack.enter_context(pytest.raises(SystemExit))
        cli.main()
    return (end.value.code not in (None, 0)) == refused


COMMANDS = [
    pytest.param(part[part.index("seqlab") + 1 :], id=f"{page.name}: {' '.join(part)}"[:100])
    for page in PAGES
    for block in blocks(page)
    if block.language in ("console", "bash")
    for line in block.text.replace("\\\n", " ").splitlines()
    if "seqlab" in (part := shlex.split(line.removeprefix("$ ").rpartition("| ")[2], comments=True))
]


@pytest.mark.parametrize("arguments", COMMANDS)
def test_every_documented_command_is_understood(arguments):
    understood(typer.main.get_command(cli.app), "seqlab", list(arguments))


def understood(command, name: str, arguments: list[str], parent=None) -> None:
    """Parses the arguments of a command, or of a group and of the command of it that they name."""
    with command.make_context(name, arguments, parent=parent) as context:
        if hasattr(command, "resolve_command"):
            rest = [*context._protected_args, *context.args]
            name, inner, rest = command.resolve_command(context, rest)
            understood(inner, name, rest, context)


def test_the_status_table_is_that_of_the_code():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert readme == status.replaced(readme, status.table(status.promised)), (
        "run python docs/status.py"
    )


def test_the_table_of_published_families_is_that_of_the_code():
    page = status.CHECKPOINTS.read_text("utf-8")
    assert page == status.replaced(page, status.families(), "families"), "run python docs/status.py"


def test_the_table_of_tasks_is_that_of_the_code():
    page = status.TASKS.read_text("utf-8")
    assert page == status.replaced(page, status.task_table(), "tasks"), "run python docs/status.py"


def test_every_link_of_a_page_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
