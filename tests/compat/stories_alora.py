"""What scripts do with peft's activated LoRA (see stories.py)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from tests.compat.stories import fill, refused, said
from tests.conftest import llama
from tests.contract.test_alora import CALL, rows

IDS, MASK = rows()
HOW: dict[str, Any] = dict(input_ids=IDS, attention_mask=MASK, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)


def out(model: Any, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK, **more).logits * MASK[..., None]


def config(peft: Any, **more: Any) -> Any:
    return peft.LoraConfig(
        **dict(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], alora_invocation_tokens=list(CALL), task_type="CAUSAL_LM") | more
    )


def alora_lives(peft: Any, folder: Path) -> dict[str, Any]:
    """From the start over training and files to the end."""
    base = llama()
    before = out(base)
    made = peft.get_peft_model(base, config(peft, lora_bias=True))
    found: dict[str, Any] = {"start": out(made), "parameters": [(n, p.requires_grad) for n, p in made.named_parameters()]}
    fill(made)
    found |= {"moved": out(made), "state": list(made.state_dict()), "modules": [n for n, _ in made.named_modules()]}
    (out_ := made.train()(input_ids=IDS, attention_mask=MASK, labels=IDS.masked_fill(MASK == 0, -100))).loss.backward()
    found |= {"loss": out_.loss.detach(), "gradients": {n: p.grad for n, p in made.named_parameters() if p.grad is not None}}
    made.eval().save_pretrained(folder)
    with made.disable_adapter():
        found["disabled"] = torch.equal(out(made), before)
    found |= {"written": made.generate(**HOW), "read": out(peft.PeftModel.from_pretrained(llama(), folder))}
    found |= {"merge": refused(made.merge_adapter), "for good": refused(lambda: copy.deepcopy(made).merge_and_unload(safe_merge=True))}
    plain = made.unload()
    return found | {"plain": torch.equal(out(plain), before), "class": type(plain).__name__, "names": list(plain.state_dict())}


def alora_told(peft: Any, folder: Path) -> dict[str, Any]:
    """Where it begins, said by the caller; and calls in which it cannot be found."""
    made = peft.get_peft_model(llama(), config(peft)).eval()
    fill(made)
    vectors = made.get_input_embeddings()(IDS)
    found: dict[str, Any] = {
        "offsets": out(made, alora_offsets=[2, 5, None, 40]), "written": made.generate(**HOW, alora_offsets=[1, None, 3, 9]),
        "said": said(lambda: made(inputs_embeds=vectors)), "wrong task": said(lambda: config(peft, task_type=None)),
    }  # fmt: skip
    with torch.no_grad():
        found["embedded"] = made(inputs_embeds=vectors).logits
        with made.disable_adapter():
            cache = made(input_ids=IDS[:1, :6], use_cache=True).past_key_values  # the invocation lies in what the base has read
        found["goes on"] = made.generate(**HOW | {"input_ids": IDS[:1], "attention_mask": MASK[:1]}, past_key_values=cache)
    return found


def alora_several(peft: Any, folder: Path) -> dict[str, Any]:
    """Adapters of both kinds, each row its own."""
    made = peft.get_peft_model(llama(), config(peft))
    made.add_adapter("late", config(peft, r=3, target_modules=["up_proj", "q_proj"], alora_invocation_tokens=CALL[1:]))
    made.add_adapter("plain", config(peft, r=2, target_modules=["k_proj"], alora_invocation_tokens=None))
    fill(made.eval())
    names = ["late", "__base__", "plain", "default"]
    found: dict[str, Any] = {"rows": out(made, adapter_names=names), "written": made.generate(**HOW, adapter_names=names)}
    found["told"] = out(made, adapter_names=names, alora_offsets=[3, 2, None, 4])
    for name in ("late", "plain", "default"):
        made.set_adapter(name)
        found[name] = out(made)
    made.delete_adapter("default")
    made.set_adapter("late")
    return found | {"left": out(made), "written late": made.generate(**HOW)}


ALORA = {f.__name__: f for f in (alora_lives, alora_told, alora_several)}
