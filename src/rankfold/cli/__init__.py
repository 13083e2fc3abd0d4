"""The command line: parse, call, print. Every command is one function of the library and a table or an object."""

from __future__ import annotations

import os
import sys

import typer

from rankfold.cli.by_blocks import compress_files
from rankfold.cli.compression import analyze, compress
from rankfold.cli.evaluation import compare, demo, evaluate, report
from rankfold.cli.finetuning import finalize, finetune
from rankfold.errors import RankfoldError

app = typer.Typer(
    name="rankfold",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Smaller, ordinary PyTorch models from pre-trained ones, by low-rank and tensor decomposition.",
)
for command in (analyze, compress, compress_files, finetune, evaluate, report, compare, finalize, demo):
    app.command()(command)

UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""The parser's own errors; typer carries its parser inside from 0.20 on, and none of its names is public."""


def main() -> None:
    """Runs the command line. Exits with 2 for what the user got wrong, 1 for a defect, without a traceback."""
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted; nothing was written but what a checkpoint keeps, where one was asked for", 130)
    except RankfoldError as error:
        _fail(str(error), 2)
    except UsageError as error:
        message = getattr(error, "message", "")
        if message:
            _fail(message, 2)
        sys.exit(0)  # called without arguments, it has shown its help
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if os.environ.get("RANKFOLD_TRACEBACK"):
            raise
        _fail(f"{type(error).__name__}: {error} (a defect; set RANKFOLD_TRACEBACK=1 for where)", 1)


def _fail(message: str, code: int) -> None:
    print(f"rankfold: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
