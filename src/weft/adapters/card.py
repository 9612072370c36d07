"""The model card beside a saved adapter: what the hub shows, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weft.core import Method

MARK = "<!-- weft wrote this card and writes it anew with each save; take this line out to keep what you change -->"
PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification"}


def card(method: Method, config: Mapping[str, Any], parameters: int, existing: str | None = None) -> str:
    """README.md for an adapter, in Markdown with the hub's metadata in front (YAML: base_model, library_name, tags).

    What somebody wrote stays: a card that exists gets only the metadata that it does not have. One that weft wrote, and that still says
    so in its last line, is written anew.

    Args:
        config: adapter_config.json as it is written.
        parameters: How many numbers the adapter has.
        existing: The card that lies there already.
    """
    base, theirs = config.get("base_model_name_or_path"), not str(config["peft_type"]).startswith("WEFT_")
    shown = None if base is None else "weft's embedded base" if base == "embedded" else Path(base).name if Path(base).is_dir() else base
    facts: dict[str, Any] = {"base_model": base} if base and not Path(base).is_dir() and base != "embedded" else {}
    facts["library_name"] = "peft" if theirs else "weft"
    tags = [type(method).__name__.lower(), "weft"] + ([f"base_model:adapter:{base}"] if "base_model" in facts else [])
    facts |= {"tags": tags} | ({"pipeline_tag": p} if (p := PIPELINES.get(str(config.get("task_type")))) else {})
    if existing is not None and MARK not in existing:
        return _with(existing, facts)
    name = type(method).__name__
    settings = {k: v for k, v in method.to_dict().items() if k not in ("name", "targets") and v not in ((), [], {}, None, False)}
    loading = 'import weft\n\nmodel = weft.load(weft.load_base("{base}"), "{here}")'.format(base=base or "the base", here="this folder")
    lines = [f"# {name} adapter" + (f" for {shown}" if shown else ""), "",
             f"{parameters:,d} parameters. {'; '.join(f'{k}: {_short(v)}' for k, v in settings.items())}.", "",
             "```python", loading, "```", ""]  # fmt: skip
    if theirs:
        lines += ["or with peft:", "", "```python", "from peft import PeftModel", "",
                  'model = PeftModel.from_pretrained(base, "this folder")', "```", ""]  # fmt: skip
    return _with("\n".join([*lines, MARK, ""]), facts)


def _with(text: str, facts: Mapping[str, Any]) -> str:
    """The text with these metadata in front, but for those that it has."""
    head, body = "", text
    if text.startswith("---\n") and "\n---\n" in text[3:]:
        head, _, body = text[4:].partition("\n---\n")
    have = {line.partition(":")[0].strip() for line in head.splitlines() if line[:1].strip()}
    new = [line for key, value in facts.items() if key not in have for line in _yaml(key, value)]
    return "\n".join(["---", *head.splitlines(), *new, "---", body if head else f"\n{body}"])


def _yaml(key: str, value: Any) -> list[str]:
    """A string or a list of strings as YAML; JSON's quotes are YAML's too."""
    if isinstance(value, list):
        return [f"{key}:", *(f"  - {json.dumps(v)}" for v in value)]
    return [f"{key}: {json.dumps(value)}"]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 60 else f"{text[:57]}..."
