"""Stories (see stories.py) of LoRA's other beginnings: those that take something out of the base, and those that look at data first."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from tests.compat.stories import IDS, logits, refused
from tests.conftest import gpt2, llama


def _products(made: Any) -> list[torch.Tensor]:
    """What is left of the base, and s·BA, for the adapted layers: the factors alone are free to change their signs."""
    layers = [m for m in made.modules() if hasattr(m, "lora_A")]
    return [t.detach().clone() for m in layers for t in (m.base_layer.weight, m.get_delta_weight("default"))]


def _one(peft: Any, folder: Path, base: Any, how: Any, **more: Any) -> dict[str, Any]:
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=how, task_type="CAUSAL_LM", **more)
    made = peft.get_peft_model(base(), config).eval()
    found: dict[str, Any] = {"start": logits(made), "products": _products(made), "bare": logits(base())}
    made.peft_config["default"].init_lora_weights = True
    made.save_pretrained(folder / "first")
    made.peft_config["default"].init_lora_weights = how
    for name, p in sorted(made.named_parameters()):
        if "lora_B" in name:
            p.data *= 1.5
    optimiser = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        loss = made(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    found |= {"losses": torch.tensor(losses), "trained": logits(made), "deltas": _products(made)}
    with made.disable_adapter():
        found["residual"] = logits(made)
    made.save_pretrained(folder / "own")
    before = {k: v for k, v in vars(made.peft_config["default"]).items() if k not in ("runtime_config", "target_modules")}
    again = peft.PeftModel.from_pretrained(base(), folder / "own")
    found |= {"again": logits(again), "again r": again.peft_config["default"].r, "again products": _products(again)}
    if how != "loftq":
        made.save_pretrained(folder / "plain", path_initial_model_for_weight_conversion=str(folder / "first"))
        plain = peft.PeftModel.from_pretrained(base(), folder / "plain")
        found |= {"plain": logits(plain), "plain products": _products(plain)}
        c = plain.peft_config["default"]
        found["plain config"] = (c.r, c.lora_alpha, c.init_lora_weights, c.rank_pattern, c.alpha_pattern, c.use_rslora)
    after = {k: v for k, v in vars(made.peft_config["default"]).items() if k not in ("runtime_config", "target_modules")}
    found |= {"config untouched": before == after, "names": list(made.peft_config), "unloaded": logits(copy.deepcopy(made).unload())}
    made.merge_adapter()
    found["merged"] = logits(made)
    made.unmerge_adapter()
    return found | {"all": logits(made.merge_and_unload())}


def pissa(peft: Any, folder: Path) -> dict[str, Any]:
    patterns = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"down_proj": 3}}
    return {
        "pissa": _one(peft, folder / "a", llama, "pissa", target_modules=["q_proj", "v_proj", "down_proj"], **patterns),
        "rslora": _one(peft, folder / "b", llama, "pissa", target_modules=["q_proj"], use_rslora=True),
        "gpt2": _one(peft, folder / "c", gpt2, "pissa", target_modules=["c_attn"], fan_in_fan_out=True),
    }


def olora(peft: Any, folder: Path) -> dict[str, Any]:
    return {"olora": _one(peft, folder, llama, "olora", target_modules=["k_proj", "up_proj"], lora_dropout=0.0)}


def mica(peft: Any, folder: Path) -> dict[str, Any]:
    config = peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights="mica", target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    made = peft.get_peft_model(llama(), config).eval()
    found = {"start": logits(made), "trains": [n for n, p in made.named_parameters() if p.requires_grad]}
    layers = [m for m in made.modules() if hasattr(m, "lora_A")]
    spans = [m.lora_B["default"].weight.detach() for m in layers]
    found["spans"] = [B @ B.T for B in spans]  # the vectors are free to change their signs
    torch.manual_seed(1)
    for m in layers:
        A, B = m.lora_A["default"].weight, m.lora_B["default"].weight
        A.data.copy_(B.T.detach() @ torch.randn(B.shape[0], A.shape[1]))
    found["moved"] = logits(made)
    made.save_pretrained(folder)
    return found | {"read": logits(peft.PeftModel.from_pretrained(llama(), folder))}


def starts_refused(peft: Any, folder: Path) -> dict[str, Any]:
    def lora(how: Any, **more: Any) -> Any:
        return peft.LoraConfig(r=4, init_lora_weights=how, **({"target_modules": ["q_proj"]} | more))

    get = peft.get_peft_model
    made = get(llama(), lora("pissa", rank_pattern={"q_proj": 2}, use_rslora=True))
    vera = get(llama(), peft.VeraConfig(target_modules=["q_proj"], r=2))
    made.save_pretrained(folder / "first")
    return {
        "rounds": refused(lambda: get(llama(), lora("pissa_iter"))), "unknown": refused(lambda: get(llama(), lora("never_heard")))[0],
        "embedding": refused(lambda: get(llama(), lora("pissa", target_modules=["embed_tokens"])))[0],
        "patterns": refused(lambda: made.save_pretrained(folder / "x", path_initial_model_for_weight_conversion=str(folder / "first"))),
        "vera": refused(lambda: vera.save_pretrained(folder / "y", path_initial_model_for_weight_conversion=str(folder / "first")))[0],
        "odd": refused(lambda: get(llama(), peft.LoraConfig(r=3, init_lora_weights="orthogonal", target_modules=["q_proj"])))[0],
    }  # fmt: skip


STARTS = {f.__name__: f for f in (pissa, olora, mica, starts_refused)}
