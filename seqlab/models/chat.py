"""Chat templates: jinja2 programs that come with a model, run in jinja2's sandbox.

A template sees the messages and a few functions and can only write text: the sandbox refuses
underscored attributes, changes of what it is given, and long ranges.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from seqlab.errors import ModelError

Message = Mapping[str, str]  # "role" and "content"


def render(template: str, messages: Sequence[Message], specials: Mapping[str, str]) -> str:
    """The text that a model answers: the messages as its template writes them, up to its turn.

    specials: `bos_token` and the like, which templates may write. Raises ModelError where jinja2 is
    not installed, or the template is wrong or refuses the messages.
    """
    given = {"add_generation_prompt": True, "tools": None, "documents": None, **specials}
    environment = _environment()
    try:
        return environment.from_string(template).render(messages=list(messages), **given)
    except Exception as error:  # a template can raise anything
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"The model's chat template does not take these messages ({reason}): "
            "give a prompt without --chat, or --system."
        ) from None


def _environment() -> Any:
    try:
        import jinja2.ext
        import jinja2.nodes
        import jinja2.sandbox
        import jinja2.utils
    except ImportError:
        raise ModelError("Chat templates need jinja2: pip install 'seqlab[hf]'.") from None

    class Generation(jinja2.ext.Extension):
        """{% generation %}...{% endgeneration %} marks what a model wrote; here it is just text."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    class Namespace(jinja2.utils.Namespace):
        """`namespace()` without names that Python keeps for itself."""

        def __setitem__(self, name, value):
            if name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"{name} cannot be set")
            super().__setitem__(name, value)

    def refuse(message):
        raise jinja2.exceptions.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    # what other programs that read these templates offer them
    environment.filters["tojson"] = lambda value, **how: json.dumps(
        value, **{"ensure_ascii": False, **how}
    )
    environment.globals = {
        "range": environment.globals["range"],
        "dict": environment.globals["dict"],
        "namespace": Namespace,
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    return environment
