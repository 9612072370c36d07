"""The entry point: finds the command, runs it, and turns what it raises into a message and an exit code.

Nothing heavy is imported here: `weft --help` answers in a blink, and a command loads only what it needs.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn

COMMANDS = {  # command -> (what it does; its module is weft.cli.<command>)
    "train": "train an adapter on a frozen base",
    "eval": "loss, perplexity and exact match of a base and its adapters",
    "generate": "answer one prompt, a file of prompts, or chat",
    "merge": "fold an adapter into its base and write a plain model",
    "quantize": "write a model in 4 or 8 bits",
    "combine": "make one adapter of several",
    "extract": "make an adapter of the difference between a base and a model fine-tuned whole",
    "demo": "watch a small model learn three tasks, on this machine, in minutes",
    "completion": "print a script that completes commands and flags in your shell",
}
OURS, USERS, INTERRUPTED, PIPE = 1, 2, 130, 141  # exit codes: a fault of weft, a mistake of the user, Ctrl-C, nobody reads the output
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)  # the user's to mend


class UsageError(Exception):
    """A mistake in the words of the command line. The message is for the user."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ours to print, and which knows the flag that was meant."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}\nSee: {self.prog} --help")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [flag for action in self._actions for flag in action.option_strings]
            flags = [_unknown(word.partition("=")[0], known) for word in unknown if word.startswith("-")]
            self.error("; ".join(flags) or f"too many words: {' '.join(unknown)}")
        return found


def _unknown(word: str, known: Sequence[str]) -> str:
    near = get_close_matches(word, known, n=1)
    return f"unknown flag {word}" + (f"; did you mean {near[0]}?" if near else "")


def parser_of(command: str, *about: Any) -> Parser:
    """The argument parser of one command; `about` is what the command's own `arguments` takes besides."""
    what = COMMANDS[command]
    shape = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog=f"weft {command}", description=f"{what[0].upper()}{what[1:]}.", formatter_class=shape)
    import_module(f"weft.cli.{command}").arguments(parser, *about)
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `weft` with these words (None: the process's own). Returns the exit code: 0, 1 our fault, 2 the user's, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _plainly(warnings.showwarning)
            code = _run(words)
        sys.stdout.flush()
        return code
    except SystemExit as e:  # argparse's --help
        return e.code if isinstance(e.code, int) else 0
    except BrokenPipeError:  # `weft ... | head`: what is left in the buffer must not be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE
    except KeyboardInterrupt:
        return _tell("interrupted", INTERRUPTED, words)
    except Exception as e:  # noqa: BLE001 (the last stop: whatever it is, the user gets a line and a code)
        return _tell(*_judge(e), words)


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        if len(words) > 1 and words[0] == "help":
            return _run([words[1], "--help"])
        print(overview())
        return 0
    if words[0] in ("-V", "--version"):
        from weft import __version__

        print(f"weft {__version__}")
        return 0
    command = words[0]
    if command not in COMMANDS:
        what = "flag" if command.startswith("-") else "command"
        near = get_close_matches(command, COMMANDS, n=1, cutoff=0.7)
        hint = f"did you mean weft {near[0]}?" if near else "weft --help lists the commands"
        raise UsageError(f"there is no {what} {command!r}; {hint}")
    module = import_module(f"weft.cli.{command}")
    args = module.parse(words[1:]) if hasattr(module, "parse") else parser_of(command).parse_args(words[1:])
    return module.run(args) or 0


def overview() -> str:
    """What `weft --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join([
        "usage: weft COMMAND [...]", "", "Parameter-efficient fine-tuning of PyTorch models.", "", *lines, "",
        "weft COMMAND --help shows a command's flags; weft --version the version.",
    ])  # fmt: skip


def _plainly(shown: Callable[..., None]) -> Callable[..., None]:
    """Shows what the user should know as a line of its own, without the place in the code; other warnings as `shown` does."""

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if category is not UserWarning:
            return shown(message, category, *where, **more)
        _print("warning:", "yellow", str(message))

    return show


def _judge(e: Exception) -> tuple[str, int]:
    """The message and the exit code for what a command raised."""
    if isinstance(e, UsageError) or _is(e, "weft.core.errors", "WeftError"):
        return str(e), USERS
    if _is(e, "weft.train.guard", "Interrupted"):
        return str(e), getattr(e, "code", INTERRUPTED)
    if isinstance(e, OSError) and e.errno in DISK:
        return f"{e.filename or 'writing'}: {e.strerror}", USERS
    if _is(e, "torch", "OutOfMemoryError"):
        hint = "Try fewer tokens at once (train.tokens), --base nf4, or a smaller model"
        return f"the device's memory is full: {str(e).splitlines()[0]}\n{hint}", USERS
    first = (str(e).strip().splitlines() or ["no message"])[0]
    return f"a fault in weft: {type(e).__name__}: {first}\nRun again with --debug for the traceback", OURS


def _is(e: Exception, module: str, name: str) -> bool:
    """Whether e is an instance of a class whose module may not be loaded (then it is not)."""
    cls = getattr(sys.modules.get(module), name, None)
    return cls is not None and isinstance(e, cls)


def _print(label: str, style: str, message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True, highlight=False).print(Text.assemble((label, style), " " if message else "", message))


def _tell(message: str, code: int, words: Sequence[str]) -> int:
    if "--debug" in words:
        traceback.print_exc()
    if message == "interrupted":
        _print("interrupted", "yellow", "")
    elif code > 128:
        _print("interrupted:", "yellow", message)
    else:
        _print("error:", "bold red", message)
    return code
