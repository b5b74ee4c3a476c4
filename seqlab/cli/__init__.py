"""The command line: one entry point, `seqlab`. Bad input is one sentence and a non-zero status."""

import os
import sys
import warnings

from seqlab.cli import benching, studying, training, using  # noqa: F401 (they register the commands)
from seqlab.cli.options import app
from seqlab.errors import SeqlabError


def main() -> None:
    """Run a command; errors of the user's input become one line and their exit status."""
    warnings.showwarning = lambda message, *_: print(f"seqlab: {message}", file=sys.stderr)
    try:
        app()
    except SeqlabError as error:
        print(f"seqlab: {error}", file=sys.stderr)
        sys.exit(error.code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
