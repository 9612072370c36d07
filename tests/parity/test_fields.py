"""docs/peft-fields.md: what weft does with each field of peft's configurations, from the tables that reading goes by."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import peft
import pytest

from weft.adapters.formats import FORMATS, Field
from weft.adapters.formats.base import COMMON

PAGE = Path(__file__).parents[2] / "docs" / "peft-fields.md"
CONFIGS = {
    "LORA": peft.LoraConfig, "ADALORA": peft.AdaLoraConfig, "VERA": peft.VeraConfig, "IA3": peft.IA3Config,
    "LN_TUNING": peft.LNTuningConfig, "LOHA": peft.LoHaConfig, "LOKR": peft.LoKrConfig, "OFT": peft.OFTConfig,
    "PREFIX_TUNING": peft.PrefixTuningConfig, "PROMPT_TUNING": peft.PromptTuningConfig, "P_TUNING": peft.PromptEncoderConfig,
    "TRAINABLE_TOKENS": peft.TrainableTokensConfig,
}  # fmt: skip
NEVER_WRITTEN = {"peft_version"}  # by peft 0.21.2 as a field of the class


def told() -> dict[str, dict[str, Field]]:
    """The table of every peft_type that has one, each once."""
    return {f.peft_type: dict(f.fields) for f in FORMATS.values() if f.fields}


def page() -> str:
    lines = [
        "# The fields of peft's configurations",
        "",
        "What `weft.load` does with each field of an `adapter_config.json`. *Held*: it becomes the hyper-parameter named. "
        "*Passed over*: it changes nothing that is computed here. *Refused*: a value that would change something stops loading, with this "
        "reason. A field that stands in no table (a newer peft's) is named in a warning, kept, and written back when the adapter is saved.",
        "",
        "Made by `python -m tests.parity.test_fields` from the tables that reading goes by, and held by a test.",
    ]
    tables = {"Fields that all have": COMMON} | {f"`{kind}`": {k: f for k, f in t.items() if k not in COMMON} for kind, t in told().items()}
    for title, table in tables.items():
        lines += ["", f"## {title}", "", "| field | | |", "|---|---|---|"]
        for name, f in sorted(table.items()):
            what = "refused" if f.refused else "held" if f.weft else "passed over"
            said = f.why if not f.weft else f.weft if ":" in f.weft or " " in f.weft else f"`{f.weft}`"
            lines.append(f"| `{name}` | {what} | {said} |")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_field_of_peft_s_has_its_place(kind: str) -> None:
    assert {f.name for f in fields(CONFIGS[kind])} - NEVER_WRITTEN <= set(told()[kind])


def test_every_field_says_what_becomes_of_it() -> None:
    assert all(f.weft or f.why for table in told().values() for f in table.values())


def test_the_page_is_what_the_tables_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tests.parity.test_fields makes it anew"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
