"""`weft completion`: a script for bash, zsh or fish that completes commands, flags, their values and file names."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import cache

from weft.cli.main import COMMANDS, parser_of

SHELLS = ("bash", "zsh", "fish")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "  bash:  weft completion bash > ~/.local/share/bash-completion/completions/weft\n"
        "  zsh:   weft completion zsh > ~/.zfunc/_weft      (with fpath+=~/.zfunc before compinit)\n"
        "  fish:  weft completion fish > ~/.config/fish/completions/weft.fish"
    )
    parser.add_argument("shell", choices=SHELLS)


def run(args: argparse.Namespace) -> int:
    print({"bash": bash, "zsh": zsh, "fish": fish}[args.shell](), end="")
    return 0


@cache
def _actions(command: str) -> tuple[argparse.Action, ...]:
    return tuple(parser_of(command)._actions)


def flags(command: str) -> Iterator[tuple[str, str, list[str] | None]]:
    """(flag, help, values) of a command: values are None for a switch, and empty where anything can stand."""
    for action in _actions(command):
        values = None if action.nargs == 0 else [str(c) for c in action.choices or getattr(action, "values", ())]
        about = " ".join((action.help or "").split()).replace("%%", "%")
        yield from ((flag, about, values) for flag in action.option_strings)


def _words(command: str) -> str:
    """What may stand behind a command, in one line: its flags, and the words of a positional that has a choice."""
    found = [flag for flag, _, _ in flags(command)]
    found += [str(c) for a in _actions(command) if not a.option_strings for c in a.choices or ()]
    return " ".join(found)


def _values() -> Iterator[tuple[str, str]]:
    """(command flag, values) where a flag's values can be counted."""
    for command in COMMANDS:
        yield from ((f"{command} {flag}", " ".join(values)) for flag, _, values in flags(command) if values)


def bash() -> str:
    cases = "\n".join(f"    {command}) words='{_words(command)}' ;;" for command in COMMANDS)
    values = "\n".join(f"    '{key}') COMPREPLY=($(compgen -W '{words}' -- \"$word\")); return ;;" for key, words in _values())
    return f"""\
_weft() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=
  COMPREPLY=()
  if (( COMP_CWORD == 1 )); then
    COMPREPLY=($(compgen -W '{" ".join(COMMANDS)} --help --version' -- "$word"))
    return
  fi
  case "${{COMP_WORDS[1]}} $before" in
{values}
  esac
  case ${{COMP_WORDS[1]}} in
{cases}
  esac
  if [[ $word == -* || ${{COMP_WORDS[1]}} == completion ]]; then
    COMPREPLY=($(compgen -W "$words" -- "$word"))
  fi
}}
complete -o default -F _weft weft
"""


def zsh() -> str:
    names = "\n".join(f"    '{command}:{_quoted(what)}'" for command, what in COMMANDS.items())
    cases = "\n".join(f"    {command}) words_=({_words(command)}) ;;" for command in COMMANDS)
    values = "\n".join(f"    '{key}') compadd -- {words}; return ;;" for key, words in _values())
    return f"""\
#compdef weft
_weft() {{
  local -a commands_ words_
  commands_=(
{names}
  )
  if (( CURRENT == 2 )); then
    _describe command commands_
    return
  fi
  case "$words[2] $words[CURRENT-1]" in
{values}
  esac
  case $words[2] in
{cases}
  esac
  if [[ $words[CURRENT] == -* || $words[2] == completion ]]; then
    compadd -- $words_
  else
    _files
  fi
}}
compdef _weft weft
"""


def fish() -> str:
    lines = [f"complete -c weft -f -n __fish_use_subcommand -a {command} -d '{_quoted(what)}'" for command, what in COMMANDS.items()]
    lines.append(f"complete -c weft -f -n '__fish_seen_subcommand_from completion' -a '{' '.join(SHELLS)}'")
    for command in COMMANDS:
        for flag, about, values in flags(command):
            option = f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}"
            takes = "" if values is None else f" -x -a '{' '.join(values)}'" if values else " -r"
            short = about.split(". ")[0][:80]
            lines.append(f"complete -c weft -n '__fish_seen_subcommand_from {command}' {option}{takes} -d '{_quoted(short)}'")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """Fit to stand between single quotes, in zsh and in fish."""
    return text.replace("\\", "").replace("'", "’")
