"""The model card beside a saved adapter: metadata that the hub reads, and a person's text that stays."""

from __future__ import annotations

from pathlib import Path

import yaml

import weft
from tests.conftest import Plain, llama


def _head(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])


def test_a_card_for_the_hub(tmp_path: Path) -> None:
    model = llama()
    model.config.name_or_path = "org/tiny: one"  # what a name holds must not break the YAML
    weft.save(weft.adapt(model, weft.LoRA(rank=2)), tmp_path)
    head = _head(tmp_path)
    assert head["base_model"] == "org/tiny: one" and head["library_name"] == "peft" and head["pipeline_tag"] == "text-generation"
    assert head["tags"] == ["lora", "weft", "base_model:adapter:org/tiny: one"]
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "rank: 2" in text and "PeftModel.from_pretrained" in text and "weft.load(" in text
    weft.save(model, tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == text


def test_what_a_person_wrote_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- mine\n---\n# My adapter\n\nGood.\n", encoding="utf-8")
    weft.save(weft.adapt(Plain(), weft.Full(targets="norm")), tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text.endswith("---\n# My adapter\n\nGood.\n")
    assert _head(tmp_path) == {"license": "mit", "tags": ["mine"], "library_name": "weft"}
    (tmp_path / "README.md").write_text("Only words.\n", encoding="utf-8")
    weft.save(weft.adapt(Plain(), weft.LoRA(rank=2)), tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8").endswith("\nOnly words.\n") and "library_name" in _head(tmp_path)


def test_what_weft_wrote_it_writes_anew(tmp_path: Path) -> None:
    for rank in (2, 4):
        model = weft.adapt(llama(), weft.LoRA(rank=rank))
        weft.save(model, tmp_path)
        assert f"rank: {rank}" in (tmp_path / "README.md").read_text(encoding="utf-8")
