"""`weft generate`: one prompt, a file of prompts, or a chat."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.cli.common import Given, adapters_given, base_of, load, model_arguments, out, say, settings_of, step
from weft.cli.main import UsageError

if TYPE_CHECKING:
    from weft.cli.answering import Speaker

AT_ONCE = 16  # prompts of a file that are answered in one batch

Message = dict[str, str]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Without PROMPT and --file: a chat on a terminal, else the prompt is read from standard input.\n\n"
        "  weft generate --adapter adapter 'Write as ISO: the third of May 1998'\n"
        "  weft generate --adapter legal --adapter code --compare 'What is a lien?'"
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="what to answer")
    parser.add_argument("--file", metavar="F", help="prompts from a file: one a line, or JSONL with prompt or messages")
    model_arguments(parser)
    group = parser.add_argument_group("answers")
    group.add_argument("--system", metavar="TEXT", help="system prompt")
    group.add_argument("--max-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 always takes the likeliest token (default: 0)")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P",
                       help="sample among the likeliest tokens that together have this probability (default: 1)")  # fmt: skip
    group.add_argument("--seed", type=int, default=0, metavar="N", help="for sampling (default: 0)")
    group.add_argument("--plain", action="store_true", help="continue the prompt as it is, without the tokenizer's chat template")
    group.add_argument("--compare", action="store_true", help="answer with the bare base and with each adapter, side by side")
    group.add_argument("--json", action="store_true", help="print one JSON object an answer")


def run(args: argparse.Namespace) -> int:
    if args.prompt is not None and args.file:
        raise UsageError("give a PROMPT or --file, not both")
    adapters = adapters_given(args.adapter)
    chats = _read(Path(args.file)) if args.file else None
    prompt = args.prompt
    if prompt is None and chats is None and not sys.stdin.isatty():
        try:
            prompt = sys.stdin.read().strip("\n")
        except UnicodeDecodeError as e:
            raise UsageError(f"the prompt on standard input is no UTF-8 text: {e.reason} at byte {e.start}") from None
    for what, text in (("the prompt", prompt), ("--system", args.system)):
        if text and any("\udc80" <= c <= "\udcff" for c in text):  # how Python passes on bytes of the command line that are no UTF-8
            raise UsageError(f"{what} is no UTF-8 text")
    if prompt is not None and not prompt.strip():
        raise UsageError("the prompt is empty")
    speaker = _speaker(args, adapters)
    if prompt is None and chats is None:
        from weft.cli.chat import talk

        return talk(speaker, [g.name for g in adapters], args.system, args.compare)
    if len(adapters) > 1 and not args.compare:
        say(f"answering with {adapters[0].name}; --compare answers with each adapter")
    chats = [_with_system(chat, args.system) for chat in chats or [[{"role": "user", "content": prompt}]]]
    if args.compare:
        _compare(speaker, chats, [None, *(g.name for g in adapters)], args.json)
    elif args.json or len(chats) > 1:
        _many(speaker, chats, args.json, adapters[0].name if adapters else None)
    else:
        stream(speaker, chats[0])
    return 0


def _speaker(args: argparse.Namespace, adapters: Sequence[Given]) -> Speaker:
    base = base_of(args.model, adapters)  # before anything heavy is loaded
    plain = args.plain or any((settings_of(g.folder).get("data") or {}).get("template") == "plain" for g in adapters[:1])
    with step("loading libraries", tell=False):
        from weft.cli.answering import Sampling, Speaker
    sampling = Sampling(args.max_tokens, args.temperature, args.top_p, args.seed)  # its faults are told before the model is loaded
    return Speaker(*load(base, adapters, args.base, args.device), sampling, plain)


def stream(speaker: Speaker, chat: Sequence[Message], said: list[str] | None = None) -> str:
    """Print an answer as it grows; returns it. `said` collects its pieces, for a caller whose user stops it by Ctrl-C."""
    said = [] if said is None else said

    def show(row: int, text: str) -> None:
        said.append(text)
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        speaker.answer([chat], on_text=show)
    finally:
        sys.stdout.write("\n" if said else "")
        sys.stdout.flush()
    return "".join(said)


def side_by_side(speaker: Speaker, chat: Sequence[Message], names: Sequence[str | None]) -> list[str]:
    """The answers of the base and of adapters to one chat, in one batch, shown in columns that grow."""
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    console, titles, said = out(), [n or "base" for n in names], [""] * len(names)

    def table() -> Any:
        made = Table(expand=True)
        for title in titles:
            made.add_column(title, ratio=1)
        made.add_row(*map(Text, said))
        return made

    if not console.is_terminal:
        for title, answer in zip(titles, speaker.answer([chat] * len(names), names), strict=True):
            print(f"{title}:\n{answer}\n")
        return said
    console.soft_wrap = False
    with Live(table(), console=console, refresh_per_second=12) as live:

        def show(row: int, text: str) -> None:
            said[row] += text
            live.update(table())

        speaker.answer([chat] * len(names), names, show)
    return said


def _compare(speaker: Speaker, chats: Sequence[Sequence[Message]], names: Sequence[str | None], as_json: bool) -> None:
    for chat in chats:
        if as_json:
            answers = speaker.answer([chat] * len(names), names)
            by_name = dict(zip((n or "base" for n in names), answers, strict=True))
            print(json.dumps({"prompt": chat[-1]["content"], "answers": by_name}, ensure_ascii=False), flush=True)
            continue
        if len(chats) > 1:
            out().print(f"> {chat[-1]['content']}", markup=False, style="bold")
        side_by_side(speaker, chat, names)


def _many(speaker: Speaker, chats: Sequence[Sequence[Message]], as_json: bool, adapter: str | None) -> None:
    """Answer in batches, and print in the file's order."""
    console = out()
    for start in range(0, len(chats), AT_ONCE):
        some = chats[start : start + AT_ONCE]
        for chat, answer in zip(some, speaker.answer(some), strict=True):
            if as_json:
                print(json.dumps({"prompt": chat[-1]["content"], "adapter": adapter, "answer": answer}, ensure_ascii=False), flush=True)
            else:
                console.print(f"> {chat[-1]['content']}", markup=False, style="bold")
                print(f"{answer}\n", flush=True)


def _with_system(chat: list[Message], system: str | None) -> list[Message]:
    """The chat with this system prompt, unless it has one of its own."""
    return [{"role": "system", "content": system}, *chat] if system and chat[0]["role"] != "system" else chat


def _read(path: Path) -> list[list[Message]]:
    """The chats of a file of prompts; a reference answer at the end of a row's messages is left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as e:
        raise UsageError(f"{path}: the prompts cannot be read ({e.strerror})") from e
    except UnicodeDecodeError as e:
        raise UsageError(f"{path}: not a text file in UTF-8") from e
    read = _row if path.suffix in (".jsonl", ".ndjson") else lambda where, line: [{"role": "user", "content": line}]
    chats = [read(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not chats:
        raise UsageError(f"{path} has no prompts")
    return chats


def _row(where: str, line: str) -> list[Message]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as e:
        raise UsageError(f"{where}: broken JSON, {e.msg} at column {e.colno}") from e
    if isinstance(row, dict) and isinstance(row.get("prompt"), str):
        return [{"role": "user", "content": row["prompt"]}]
    chat = row.get("messages") if isinstance(row, dict) else None
    if isinstance(chat, list) and chat and all(isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in chat):
        asked = chat[:-1] if chat[-1]["role"] == "assistant" else chat
        if asked:
            return asked
    raise UsageError(f'{where}: a row is {{"prompt": "..."}} or {{"messages": [{{"role": "user", "content": "..."}}]}}')
