"""extract with `modules_to_save`: what full fine-tuning changed and no low-rank update holds is kept whole on request, else named."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import weft
from tests.conftest import ConvNet, gpt2, jolt, llama
from weft.adapters import attached
from weft.core import Replaced, is_linear


def tuned_of(base: nn.Module) -> Any:
    """Every linear layer moved by a matrix of rank 2, all else by a little of everything."""
    torch.manual_seed(4)
    tuned: Any = copy.deepcopy(base)
    with torch.no_grad():
        for m in tuned.modules():
            if is_linear(m):
                m.weight += 0.1 * torch.randn(m.weight.shape[0], 2) @ torch.randn(2, m.weight.shape[1])
        plain = {id(m.weight) for m in tuned.modules() if is_linear(m)}
        for p in tuned.parameters():
            if id(p) not in plain:
                p += 0.05 * torch.randn(p.shape)
    return tuned


def out(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits  # type: ignore[no-any-return]


def tied() -> Any:
    return llama(tie_word_embeddings=True)


@pytest.mark.filterwarnings("ignore:.*(tied|tie_word_embeddings|fan_in_fan_out)", "ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("make", [llama, gpt2, tied], ids=["llama", "gpt2", "tied"])
def test_all_that_changed_is_kept(make: Callable[[], Any], ids: Tensor, tmp_path: Path) -> None:
    base = make()
    tuned = tuned_of(base)
    want = out(tuned, ids)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")

    lossy = weft.extract(tmp_path / "base", tmp_path / "tuned", rank=2, output=tmp_path / "lossy")
    assert lossy.notes[-1].endswith('numbers are left out: modules_to_save="changed" keeps them whole')
    assert all("left out" in note for note in lossy.notes)
    assert not torch.allclose(out(weft.load(make(), tmp_path / "lossy"), ids), want, atol=1e-2)

    kept = weft.extract(tmp_path / "base", tmp_path / "tuned", rank=2, output=tmp_path / "whole", modules_to_save="changed")
    assert kept.notes and all(note.endswith("kept whole") for note in kept.notes)
    again = weft.load(make(), tmp_path / "whole")
    assert torch.allclose(out(again, ids), want, atol=2e-3)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "whole").eval()
    assert torch.allclose(out(theirs, ids), want, atol=2e-3)

    weft.extract(base, tuned, rank=2, modules_to_save="changed", name="here")  # and in memory
    assert torch.allclose(out(base, ids), want, atol=2e-3)
    weft.save(base, tmp_path / "again", name="here")
    names = [json.loads((tmp_path / where / "adapter_config.json").read_text())["modules_to_save"] for where in ("whole", "again")]
    assert names[0] == names[1]
    with weft.using(base, None):
        assert torch.equal(out(base, ids), out(make(), ids))
    for merged in (weft.merge(base, "here"), weft.merge(again)):
        assert torch.allclose(out(merged, ids), want, atol=2e-3)


def test_only_what_is_named_and_changed_is_kept(ids: Tensor) -> None:
    base = llama()
    tuned = tuned_of(base)
    tuned.model.layers[0].input_layernorm.weight.data.copy_(base.model.layers[0].input_layernorm.weight)
    kept = weft.extract(base, tuned, rank=2, modules_to_save=["*layernorm", "layers.1.mlp.up_proj"])
    whole = {p for p, a in attached(base, "extracted").items() if isinstance(a, Replaced)}
    assert whole == {"model.layers.0.post_attention_layernorm", "model.layers.1.mlp.up_proj"} | {
        f"model.layers.1.{name}_layernorm" for name in ("input", "post_attention")
    }
    assert "model.layers.1.mlp.up_proj" not in kept.layers and "model.layers.0.mlp.up_proj" in kept.layers
    told = "\n".join(kept.notes)
    assert "model.layers.*.post_attention_layernorm.weight (2 tensors, 64 numbers)" in told and "kept whole" in told
    assert "model.embed_tokens.weight (3,072 numbers)" in told and "left out" in told
    with pytest.raises(weft.WeftError, match="modules_to_save='norms' matches no module"):
        weft.extract(llama(), tuned, modules_to_save="norms", name="other")


def test_a_tied_weight_is_kept_under_any_of_its_names(ids: Tensor) -> None:
    base = tied()
    tuned = tuned_of(base)
    weft.extract(base, tuned, rank=2, modules_to_save="lm_head")
    parts = attached(base, "extracted")
    assert parts["lm_head"]._parameters["weight"] is parts["model.embed_tokens"]._parameters["weight"]
    assert torch.equal(parts["lm_head"]._parameters["weight"], tuned.lm_head.weight)  # type: ignore[arg-type]


def test_other_kinds_of_layer(tmp_path: Path) -> None:
    base = ConvNet().eval()
    tuned = copy.deepcopy(base)
    jolt(tuned, 0.2)
    x = torch.randn(5, 3, 8, 8)
    kept = weft.extract(base, tuned, rank=64, targets=["first", "out"], modules_to_save="changed")
    assert set(kept.layers) == {"first", "out"} and torch.allclose(base(x), tuned(x), atol=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("key", ["model.norm", "model.embed_tokens"])
def test_what_changed_beside_the_layers_alone(key: str, ids: Tensor, tmp_path: Path) -> None:
    base = llama()
    tuned: Any = copy.deepcopy(base)
    tuned.get_submodule(key).weight.data += 1
    with pytest.raises(weft.WeftError, match=r'same weights .* but \S+ \([\d,]+ numbers\) changed by .*"changed" keeps it whole'):
        weft.extract(base, tuned)
    kept = weft.extract(base, tuned, modules_to_save="changed", output=tmp_path)
    assert kept.energy == 1 and key in str(kept) and str(kept).endswith("kept whole")
    want = out(tuned, ids)
    assert torch.allclose(out(base, ids), want, atol=1e-5)
    assert torch.allclose(out(weft.load(llama(), tmp_path), ids), want, atol=1e-5)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.allclose(out(theirs, ids), want, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.allclose(out(weft.merge(weft.load(llama(), tmp_path / "theirs")), ids), want, atol=1e-5)
