"""The chat of `weft generate`: its history, and adapters that change while it goes on."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import weft.adapters
from weft.cli.common import err
from weft.cli.generate import Message, side_by_side, stream
from weft.core import WeftError

if TYPE_CHECKING:
    from weft.cli.answering import Speaker

HELP = """\
/adapter NAME   answer with this adapter from now on; several names: all of them together; none: the bare base
/compare        turn on or off that the base and every adapter answer side by side
/reset          forget the conversation
/help           this
/quit           leave (so does Ctrl-D); Ctrl-C stops an answer"""


def talk(speaker: Speaker, names: Sequence[str], system: str | None, compare: bool) -> int:
    """Read lines from the terminal until it is left. Returns the exit code."""
    chat = Conversation(speaker, names, system, compare)
    err().print(chat.welcome(), markup=False, style="dim")
    with suppress(ImportError):  # not on every system; lines can be typed without it
        import readline  # noqa: F401 (line editing and history for input())
    while True:
        try:
            line = input(chat.prompt()).strip()
        except EOFError:
            err().print()
            return 0
        except KeyboardInterrupt:
            err().print("\n(Ctrl-D or /quit leaves)", style="dim")
            continue
        if not chat.take(line):
            return 0


class Conversation:
    """What was said, and who answers."""

    def __init__(self, speaker: Speaker, names: Sequence[str], system: str | None, compare: bool = False) -> None:
        self.speaker, self.names, self.compare = speaker, list(names), compare
        self.start: list[Message] = [{"role": "system", "content": system}] if system else []
        self.said: list[Message] = []

    def welcome(self) -> str:
        alone = " There is no chat template here: every line is continued by itself." if self.speaker.plain else ""
        have = f"adapters: {', '.join(self.names)}" if self.names else "the bare base, no adapter"
        return f"{have}. /help lists the commands.{alone}"

    def prompt(self) -> str:
        working = weft.adapters.active(self.speaker.model)
        return f"{'compare' if self.compare else '+'.join(working) or 'base'}> "

    def take(self, line: str) -> bool:
        """Act on one line; False to leave."""
        if line.startswith("/"):
            return self._command(line)
        if line:
            self._answer(line)
        return True

    def _command(self, line: str) -> bool:
        try:
            word, *rest = shlex.split(line)
        except ValueError:
            word, *rest = line.split()
        if word in ("/quit", "/exit", "/q"):
            return False
        if word == "/reset":
            self.said.clear()
            self._tell("forgotten")
        elif word == "/compare":
            self.compare = not self.compare
            self._tell(f"side by side: {'on' if self.compare else 'off'}")
        elif word == "/adapter":
            self._adapter(rest)
        else:
            self._tell(HELP if word == "/help" else f"no command {word}\n{HELP}")
        return True

    def _adapter(self, names: list[str]) -> None:
        wrong = [n for n in names if n not in (*self.names, "none")]
        if not names or wrong:
            self._tell((f"no adapter {', '.join(wrong)}; " if wrong else "") + f"/adapter with one of: {', '.join((*self.names, 'none'))}")
            return
        weft.adapters.use(self.speaker.model, [n for n in names if n != "none"])
        self.compare = False
        self._tell(f"{' and '.join(weft.adapters.active(self.speaker.model)) or 'the bare base'} from now on")

    def _answer(self, line: str) -> None:
        before = list(self.said)
        try:
            self._answered(line)
        except WeftError as e:  # a line that is too long, say: it was never said, and the chat goes on
            self.said[:] = before
            self._tell(str(e))

    def _answered(self, line: str) -> None:
        if self.speaker.plain:
            self.said.clear()
        self.said.append({"role": "user", "content": line})
        dropped = 0
        while len(self.said) > 1 and not self.speaker.fits(self.start + self.said):
            del self.said[: 2 if len(self.said) > 2 else 1]
            dropped += 1
        self.speaker.check(self.start + self.said)
        if dropped:
            self._tell(f"(the model's context is full: the first {dropped} exchange{'s' if dropped > 1 else ''} left out)")
        heard: list[str] = []
        try:
            if self.compare:
                answer = side_by_side(self.speaker, self.start + self.said, [None, *self.names])[-1]
            else:
                answer = stream(self.speaker, self.start + self.said, heard)
        except KeyboardInterrupt:
            answer = "".join(heard)
            self._tell("(stopped)")
        except Exception:  # whatever it was: the question without its answer is no part of what is said next
            self.said.pop()
            raise
        self.said.append({"role": "assistant", "content": answer})

    def _tell(self, text: str) -> None:
        err().print(text, markup=False, style="dim")
