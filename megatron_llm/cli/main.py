"""The `megatron-llm` command: a table of commands, one module each, and one way to report a user's mistake.

A command module has `HELP`, `add_arguments(parser)` and `run(args) -> exit code`. Its top level imports nothing heavy
(torch, transformers): `--help` loads all of them and must answer at once.
"""

from __future__ import annotations

import argparse
import importlib
import keyword
import resource
import sys
import traceback
from types import ModuleType

from megatron_llm import __version__

COMMANDS = (
    "train", "generate", "chat", "evaluate", "import", "export", "push", "verify", "preprocess", "preprocess-chat", "merge",
    "dedup", "inspect", "plan", "report", "config",
)  # fmt: skip


def _module(command: str) -> ModuleType:
    name = command.replace("-", "_")
    return importlib.import_module(f"megatron_llm.cli.{name}{'_' if keyword.iskeyword(name) else ''}")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(prog="megatron-llm", description="3D-parallel training of decoder language models.")
    parser.add_argument("--version", action="version", version=f"megatron-llm {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = _module(name)
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error")
        module.add_arguments(command)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 bad input or failed run, 2 usage, 75 stopped after saving.

    A ValueError is a mistake in the user's input: its message is all that is shown. So is a file that cannot be opened or
    made. Any other exception is a defect or a fault of the machine and keeps its traceback.
    """
    args = build_parser().parse_args(argv)
    _allow_many_files()
    try:
        return int(_module(args.command).run(args))
    except ValueError as error:
        if args.debug:
            traceback.print_exc()
        elif _reports(error):
            print(f"megatron-llm {args.command}: error: {_message(error)}", file=sys.stderr)
        else:
            from megatron_llm.training.launcher import leave_after_rank_0

            leave_after_rank_0()
        return 1
    except OSError as error:
        if error.filename is None or args.debug:
            raise
        print(f"megatron-llm {args.command}: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _allow_many_files() -> None:
    """Hundreds of data sets are open at once in a merge or a blend; the usual soft limit of 1,024 files is for few."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _reports(error: ValueError) -> bool:
    """Whether this process prints a user error.

    Ranks check the same input and would print the same message, so rank 0 speaks for all; an error that carries a note
    (which rank, what it was doing) is that rank's own.
    """
    from megatron_llm.training.launcher import launch_of

    try:
        return launch_of().rank == 0 or bool(_notes(error))
    except ValueError:  # the launcher's variables are what is wrong
        return True


def _message(error: ValueError) -> str:
    return "\n".join([str(error), *_notes(error)])


def _notes(error: ValueError) -> list[str]:
    return getattr(error, "__notes__", [])
