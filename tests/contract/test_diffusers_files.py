"""LoRA files as diffusers writes them: several parts in one file, old and new names, with and without a configuration in the header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import weft
from weft.core import WeftError

ATTENTION = "down_blocks.0.attentions.0.attn1"


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(6, 6, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(6, 6), nn.Dropout(0.0)])

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out[0](torch.softmax(self.to_q(x) @ self.to_k(x).mT, -1) @ self.to_v(x))


def unet() -> nn.Module:
    """The names of a UNet, and little else of one."""
    torch.manual_seed(0)
    block = nn.ModuleDict({"attentions": nn.ModuleList([nn.ModuleDict({"attn1": Attention()})]), "conv": nn.Conv2d(6, 5, 3, padding=1)})
    return nn.ModuleDict({"down_blocks": nn.ModuleList([block])})


def out(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    block = model["down_blocks"][0]
    with torch.no_grad():
        return block["attentions"][0]["attn1"](x), block["conv"](x.mT[..., None].expand(-1, -1, -1, 4))


def with_update(updates: dict[str, Tensor]) -> nn.Module:
    model = unet()
    with torch.no_grad():
        for path, delta in updates.items():
            model.get_submodule(path).weight.add_(delta)
    return model


def factors(ranks: dict[str, int]) -> dict[str, tuple[Tensor, Tensor]]:
    made, base = {}, unet()
    for path, r in ranks.items():
        weight = base.get_submodule(path).weight
        made[path] = (torch.randn(r, *weight.shape[1:]), torch.randn(weight.shape[0], r, *(1 for _ in weight.shape[2:])))
    return made


def product(A: Tensor, B: Tensor) -> Tensor:
    return (B.flatten(1) @ A.flatten(1)).view(B.shape[0], *A.shape[1:])


RANKS = {f"{ATTENTION}.to_q": 2, f"{ATTENTION}.to_out.0": 2, f"{ATTENTION}.to_v": 3, "down_blocks.0.conv": 2}


def same(model: nn.Module, updates: dict[str, Tensor]) -> None:
    x = torch.randn(2, 3, 6)
    for got, want, bare in zip(out(model, x), out(with_update(updates), x), out(unet(), x), strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm() and (want - bare).norm() > 1e-2 * want.norm()


@pytest.mark.parametrize("style", ["lora_A", "lora.down", "lora_linear_layer.down"])
@pytest.mark.parametrize("alpha", [False, True])
def test_a_part_of_a_pipeline_s_file(style: str, alpha: bool, tmp_path: Path) -> None:
    made, tensors = factors(RANKS), {}
    up = style.replace("_A", "_B").replace("down", "up")
    for path, (A, B) in made.items():
        tensors |= {f"unet.{path}.{style}.weight": A, f"unet.{path}.{up}.weight": B}
        if alpha:
            tensors[f"unet.{path}.alpha"] = torch.tensor(1.5 if "conv" in path else 4.0)
    other = "text_encoder.layers.0.q_proj"
    tensors |= {f"{other}.lora_A.weight": torch.randn(2, 4), f"{other}.lora_B.weight": torch.randn(4, 2)}
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    scales = {path: (1.5 if "conv" in path else 4.0) / RANKS[path] if alpha else 1.0 for path in RANKS}
    updates = {path: scales[path] * product(*f) for path, f in made.items()}
    model = weft.load(unet(), tmp_path)
    same(model, updates)
    weft.save(model, tmp_path / "ours")
    same(weft.load(unet(), tmp_path / "ours"), updates)


def test_processors_of_attention(tmp_path: Path) -> None:
    made = factors({f"{ATTENTION}.to_q": 2, f"{ATTENTION}.to_out.0": 2})
    names = {f"{ATTENTION}.to_q": "to_q_lora", f"{ATTENTION}.to_out.0": "to_out_lora"}
    tensors = {}
    for path, (A, B) in made.items():
        tensors |= {f"{ATTENTION}.processor.{names[path]}.{side}.weight": t for side, t in (("down", A), ("up", B))}
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    x, updates = torch.randn(2, 3, 6), {path: product(*f) for path, f in made.items()}
    got, want = out(weft.load(unet(), tmp_path), x)[0], out(with_update(updates), x)[0]
    assert (got - want).norm() <= 1e-5 * want.norm()


def test_the_header_says_how(tmp_path: Path) -> None:
    made, tensors = factors(dict.fromkeys(RANKS, 2)), {}
    for path, (A, B) in made.items():
        tensors |= {f"unet.{path}.lora_A.weight": A, f"unet.{path}.lora_B.weight": B}
    told = {"unet.r": 2, "unet.lora_alpha": 6, "unet.use_rslora": True, "unet.peft_type": "LORA", "text_encoder.r": 9}
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors", metadata={"lora_adapter_metadata": json.dumps(told)})
    same(weft.load(unet(), tmp_path), {path: 6 / 2**0.5 * product(*f) for path, f in made.items()})


def test_what_does_not_fit(tmp_path: Path) -> None:
    path, (A, B) = next(iter(factors(RANKS).items()))
    whole = {f"unet.{path}.lora_A.weight": A, f"unet.{path}.lora_B.weight": B}
    for tensors, words in (
        ({"lora_unet_down_blocks_0_to_q.lora_down.weight": A}, ["none of a diffusers LoRA", "lora_unet_down"]),
        ({"transformer.blocks.0.to_q.lora_A.weight": A}, ["for transformer", "none of the layers"]),
        (whole | {"unet.mid_block.to_q.lora_A.weight": A.clone()}, ["no layer of this model", "mid_block"]),
        ({f"unet.{path}.lora_A.weight": A}, ["missing", "lora_B"]),
    ):
        save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
        model = unet()
        with pytest.raises(WeftError) as e:
            weft.load(model, tmp_path)
        assert all(w in str(e.value) for w in words), e.value
        assert not weft.adapters.names(model)
