"""Stories (see stories.py) of a head that shares its weight with the embedding, and of layers that are there several times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.compat.stories import IDS, fill, logits, said
from tests.conftest import llama


def _tied() -> Any:
    return llama(tie_word_embeddings=True)


def _life(peft: Any, folder: Path, **more: Any) -> dict[str, Any]:
    made: Any = None

    def make() -> None:
        nonlocal made
        made = peft.get_peft_model(_tied(), peft.LoraConfig(task_type="CAUSAL_LM", r=2, **more)).eval()

    found: dict[str, Any] = {"said": said(make)}
    fill(made)
    config = made.peft_config["default"]
    found |= {
        "names": sorted((n, p.requires_grad) for n, p in made.named_parameters()), "state": sorted(made.state_dict()),
        "modules": [n for n, _ in made.named_modules()], "moved": logits(made), "whole": config.modules_to_save,
        "targets": sorted(config.target_modules), "saved": peft.get_peft_model_state_dict(made, save_embedding_layers=False),
    }  # fmt: skip
    optimiser = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        made(input_ids=IDS, labels=IDS).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    found["trained"] = logits(made)
    made.save_pretrained(folder, save_embedding_layers=False)
    return found | {"read": logits(peft.PeftModel.from_pretrained(_tied(), folder))}


def tied(peft: Any, folder: Path) -> dict[str, Any]:
    return {
        "whole": _life(peft, folder / "a", target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        "by its head": _life(peft, folder / "b", target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True),
        "factors": _life(peft, folder / "c", target_modules=["embed_tokens", "v_proj"], ensure_weight_tying=True),
        "of the head": _life(peft, folder / "d", target_modules=["lm_head"], ensure_weight_tying=True),
        "not asked": said(lambda: peft.get_peft_model(_tied(), peft.LoraConfig(target_modules=["embed_tokens"]))),
        "no embedding": said(lambda: peft.get_peft_model(_tied(), peft.LoraConfig(target_modules=["q_proj"], ensure_weight_tying=True))),
        "nothing tied": said(lambda: peft.get_peft_model(llama(), peft.LoraConfig(
            target_modules=["embed_tokens"], ensure_weight_tying=True))),
    }  # fmt: skip


def replicated(peft: Any, folder: Path) -> dict[str, Any]:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", layer_replication=[[0, 2], [1, 2]])
    made = peft.get_peft_model(llama(), config).eval()
    layers = made.base_model.model.model.layers
    shared = layers[1].mlp.up_proj.weight is layers[2].mlp.up_proj.weight
    fill(made)
    found = {"layers": len(layers), "shared": shared, "names": [n for n, _ in made.named_parameters()], "moved": logits(made),
             "config": made.config.num_hidden_layers}  # fmt: skip
    made(input_ids=IDS, labels=IDS).loss.backward()
    found["gradients"] = {n: p.grad for n, p in made.named_parameters() if p.grad is not None}
    found["generated"] = made.generate(input_ids=IDS, max_new_tokens=3, do_sample=False)
    made.save_pretrained(folder)
    return found | {"read": logits(peft.PeftModel.from_pretrained(llama(), folder)), "plain": logits(made.unload())}


TIED = {f.__name__: f for f in (tied, replicated)}
