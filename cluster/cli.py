"""Command-line conventions shared by every `python -m BOX …`: exit codes, one-line errors, `--json` last lines."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster.errors import RunFailure, UsageError
from cluster.secrets import redact, redacted


class Parser(argparse.ArgumentParser):
    """argparse with our exit code for bad usage (2) and examples kept as typed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> Any:
        print(f"{self.prog}: {message}  (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def run(prog: str, main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> None:
    """Calls `main(argv)` and exits: 0, or the code of the error it raised, with one line on stderr and no traceback.

    `GEOLOOM_TRACEBACK=1` prints the traceback too, for whoever debugs the code rather than the input.
    """
    try:
        code = main(sys.argv[1:] if argv is None else argv) or 0
    except (UsageError, RunFailure) as error:
        explain(prog, error)
        code = error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:  # no space, no permission, no such file: the system's own words and the path
        explain(prog, error)
        code = 1
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def dispatch(box: str, description: str, commands: Mapping[str, tuple[str, str]]) -> None:
    """`python -m BOX COMMAND …`: imports the module of the chosen command only, and runs it.

    commands: name → (module with `add_arguments(parser)` and `main(args)`, one-line help).
    """
    overview = "\n".join(f"  {name:<10} {line}" for name, (_, line) in commands.items())
    parser = Parser(f"python -m {box}", description=description, epilog=f"commands:\n{overview}")
    parser.add_argument("command", choices=list(commands), metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see python -m BOX COMMAND --help")
    known = parser.parse_args(sys.argv[1:])
    prog = f"python -m {box} {known.command}"

    def main(argv: Sequence[str]) -> int | None:
        module = importlib.import_module(commands[known.command][0])
        sub = Parser(prog, description=module.__doc__)
        module.add_arguments(sub)
        # intermixed: overrides may stand before and after options (argparse cannot do that with subcommands)
        parse = sub.parse_args if sub._subparsers else sub.parse_intermixed_args
        return module.main(parse(argv))

    run(prog, main, known.arguments)


def print_json(figures: Mapping[str, Any]) -> None:
    """Prints the machine-readable last line (`--json`): one compact JSON object, keys as given."""
    print(json.dumps(redact(figures), allow_nan=False, default=str), flush=True)


def explain(prog: str, error: Exception) -> None:
    """Prints the one line a user sees of an error (and, for GEOLOOM_TRACEBACK=1, where it came from)."""
    if os.environ.get("GEOLOOM_TRACEBACK") == "1":
        print(redacted(traceback.format_exc()), file=sys.stderr)
    print(f"{prog}: error: {redacted(str(error))}", file=sys.stderr, flush=True)


def private_files() -> None:
    """What this process writes is for its owner only, where the storage knows owners. GEOLOOM_UMASK=027 lets a group read."""
    os.umask(int(os.environ.get("GEOLOOM_UMASK", "077"), 8))
