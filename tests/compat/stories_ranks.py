"""Stories (see stories.py) of ranks that change: AdaLoRA's budget, and what of it stands in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.compat.stories import IDS, fill, logits, refused
from tests.conftest import llama


def _config(peft: Any, **more: Any) -> Any:
    given = dict(init_r=4, target_r=1, tinit=1, tfinal=2, deltaT=2, total_step=10, lora_alpha=6, orth_reg_weight=0.1)
    return peft.AdaLoraConfig(target_modules=["q_proj", "k_proj", "up_proj"], task_type="CAUSAL_LM", **given | more)


def _kept(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())["rank_pattern"]


def adalora_to_the_end(peft: Any, folder: Path) -> dict[str, Any]:
    made = peft.get_peft_model(llama(), _config(peft)).train()
    fill(made)
    optimiser = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.05)
    found: dict[str, Any] = {"names": (made.base_model.trainable_adapter_name, sorted(made.state_dict())),
                             "budget": [made.base_model.rankallocator.budget_schedule(s) for s in (1, 2, 3, 4, 7, 8)]}  # fmt: skip
    made.eval().save_pretrained(folder / "whole")
    found["whole"] = _kept(folder / "whole")
    made.train()
    losses = []
    for step in range(1, 11):
        loss = made(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimiser.step()
        made.base_model.update_and_allocate(step)
        optimiser.zero_grad()
        losses.append(loss.item())
        pattern = made.peft_config["default"].rank_pattern
        found[f"pattern {step}"] = {k: list(v) for k, v in pattern.items()} if pattern else pattern
    made.eval()
    found |= {"losses": torch.tensor(losses), "moved": logits(made)}
    made.save_pretrained(folder / "end")
    found |= {"saved": peft.get_peft_model_state_dict(made), "kept": _kept(folder / "end")}
    found["after"] = made.peft_config["default"].rank_pattern
    again = peft.PeftModel.from_pretrained(llama(), folder / "end")
    layers = [m for m in again.modules() if hasattr(m, "lora_E")]
    found |= {"read": logits(again), "ranks": [m.lora_E["default"].shape for m in layers],
              "ranknum": [m.ranknum["default"].data for m in layers]}  # fmt: skip
    again.save_pretrained(folder / "again")
    found |= {"saved again": peft.get_peft_model_state_dict(again), "kept again": _kept(folder / "again")}
    again.merge_adapter()
    found["merged"] = logits(again)
    again.unmerge_adapter()
    return found | {"unmerged": logits(again), "plain": logits(again.merge_and_unload()), "status": vars(made.get_model_status())}


def adalora_refused(peft: Any, folder: Path) -> dict[str, Any]:
    made = peft.get_peft_model(llama(), _config(peft))
    found = {"second": refused(lambda: made.add_adapter("b", _config(peft))),
             "weighted": refused(lambda: made.base_model.add_weighted_adapter(["default"], [1.0], "c")),
             "dora": refused(lambda: _config(peft, use_dora=True))}  # fmt: skip
    made.add_adapter("c", _config(peft, inference_mode=True))
    return found | {"there": list(made.peft_config), "trains": [n for n, p in made.named_parameters() if p.requires_grad]}


RANKS = {f.__name__: f for f in (adalora_to_the_end, adalora_refused)}
