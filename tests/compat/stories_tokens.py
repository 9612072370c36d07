"""Stories (see stories.py) about trained tokens: a method of their own, and beside LoRA; with a head of its own and a tied one."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.compat.stories import IDS, logits, refused
from tests.compat.stories_more import jolt_all, t5, whole_life
from tests.conftest import Plain, llama

TOKENS = [9, 4, 20]
tied = partial(llama, tie_word_embeddings=True)


def put_all(model: Any) -> None:
    """The same numbers into every adapter tensor, by the order of names: first values of LoRA are drawn in another order."""
    torch.manual_seed(4)
    with torch.no_grad():
        for _, p in sorted((n, p) for n, p in model.named_parameters() if ".lora_" in n or "_delta" in n):
            p.copy_(torch.randn(p.shape) * 0.3)


def plain_name(module: Any) -> str:
    """weft swaps the class of an adapted layer."""
    return type(module).__name__.removeprefix("Site")


def layer(at: Any) -> dict[str, Any]:
    """What an adapted embedding, or a head, shows."""
    return {
        "class": type(at).__name__, "tokens": dict(at.token_indices), "rows": at.trainable_tokens_delta["default"].detach(),
        "before": at.trainable_tokens_original["default"], "tied": type(at.tied_adapter).__name__, "active": list(at.active_adapters),
        "merged": at.merged, "sizes": (at.in_features, at.out_features), "W": at.get_merged_weights(["default"]).detach(),
        "names": at.adapter_layer_names, "others": at.other_param_names, "base": plain_name(at.base_layer),
    }  # fmt: skip


def alone(peft: Any, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, build in {"own head": llama, "tied head": tied}.items():
        made = peft.get_peft_model(build(), peft.TrainableTokensConfig(token_indices=TOKENS, task_type="CAUSAL_LM")).eval()
        jolt_all(made)
        found[name] = whole_life(peft, made, logits, folder / name, build)
        made = peft.get_peft_model(build(), peft.TrainableTokensConfig(token_indices=TOKENS, task_type="CAUSAL_LM")).eval()
        jolt_all(made)
        inner = made.base_model.model
        found[name] |= {
            "tuner": type(made.base_model).__name__, "embedding": layer(inner.model.embed_tokens),
            "count": made.get_nb_trainable_parameters(),
            "targets": made.peft_config["default"].target_modules, "layers": copy.deepcopy([vars(s) for s in made.get_layer_status()]),
            "config": json.loads((folder / name / "adapter_config.json").read_text()),
        }  # fmt: skip
        if name == "tied head":
            found[name]["head"] = layer(inner.lm_head)
            plain = made.merge_and_unload()
            found[name]["stays tied"] = plain.lm_head.weight is plain.model.embed_tokens.weight
        else:
            both = peft.TrainableTokensConfig(token_indices=TOKENS, target_modules=["embed_tokens", "lm_head"])
            two = peft.get_peft_model(build(), both).eval()
            jolt_all(two)
            found["two"] = {"logits": logits(two), "state": peft.get_peft_model_state_dict(two)}
    return found


def beside_lora(peft: Any, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, build in {"own head": llama, "tied head": tied}.items():
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=TOKENS, task_type="CAUSAL_LM",
                                 init_lora_weights=False)  # fmt: skip
        made = peft.get_peft_model(build(), config).eval()
        put_all(made)
        life = whole_life(peft, made, logits, folder / name, build)
        made = peft.PeftModel.from_pretrained(build(), folder / name, is_trainable=True)
        wrapper = made.base_model.model.model.embed_tokens
        made(input_ids=IDS, labels=IDS).loss.backward()
        found[name] = life | {
            "wrapper": (type(wrapper).__name__, wrapper.active_adapters, plain_name(wrapper.original_module)),
            "weight": wrapper.weight.detach(), "embedding": layer(wrapper.token_adapter), "class": type(made.model.lm_head).__name__,
            "grads": {n: p.grad for n, p in made.named_parameters() if p.grad is not None},
            "layers": copy.deepcopy([vars(s) for s in made.get_layer_status()]), "count": made.get_nb_trainable_parameters(),
        }  # fmt: skip
        if name == "tied head":
            found[name]["head"] = layer(made.model.lm_head.token_adapter)
            plain = made.merge_and_unload(safe_merge=True)
            found[name]["stays tied"] = plain.lm_head.weight is plain.model.embed_tokens.weight
    return found


def by_name(peft: Any, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    cases = {"untied": (llama, {"embed_tokens": [4, 9], "lm_head": [5]}), "tied": (tied, {"embed_tokens": [4], "lm_head": [4]})}
    for name, (build, where) in cases.items():
        made = peft.get_peft_model(build(), peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=where)).eval()
        put_all(made)
        made.save_pretrained(folder / name)
        again = peft.PeftModel.from_pretrained(build(), folder / name)
        found[name] = {"logits": logits(made), "state": peft.get_peft_model_state_dict(made), "read": logits(again)}
    plain = lambda: (torch.manual_seed(0), Plain().eval())[1]  # noqa: E731
    made = peft.get_peft_model(plain(), peft.LoraConfig(r=2, target_modules=["up"], trainable_token_indices={"embed": [4, 9]}), "x")
    put_all(made)
    state = peft.get_peft_model_state_dict(made, adapter_name="x")
    found["plain"] = {"out": made(IDS).detach(), "state": state, "keys": list(made.state_dict())}
    seq2seq = peft.get_peft_model(t5(), peft.TrainableTokensConfig(token_indices=TOKENS)).eval()
    jolt_all(seq2seq)
    found["t5"] = {"out": seq2seq(input_ids=IDS, decoder_input_ids=IDS).logits.detach(), "trains": seq2seq.get_nb_trainable_parameters()[0]}
    return found


def several_tokens(peft: Any, folder: Path) -> dict[str, Any]:
    def config(ids: list[int], **more: Any) -> Any:
        return peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=ids, task_type="CAUSAL_LM", **more)

    trains = lambda: [n for n, p in made.named_parameters() if p.requires_grad]  # noqa: E731
    made = peft.get_peft_model(tied(), config([4, 9])).eval()
    made.add_adapter("b", config([9, 20, 5]))
    made.add_adapter("c", peft.LoraConfig(r=3, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    put_all(made)
    found: dict[str, Any] = {"default": logits(made), "trains": trains()}
    wrapper = made.base_model.model.model.embed_tokens
    for name in "bc":
        made.set_adapter(name)
        found[name] = (logits(made), trains(), list(wrapper.active_adapters), wrapper.weight.detach())
    rows = ["b", "__base__", "default", "b"]  # peft needs tokens in each
    found["rows"] = logits(made, adapter_names=rows)
    made.base_model.set_adapter(["b", "c"])
    found |= {"b and c": logits(made), "both": refused(lambda: made.base_model.set_adapter(["default", "b"]))}
    made.set_adapter("b")
    made.save_pretrained(folder, selected_adapters=["default", "b"])  # peft cannot save "c", which has no tokens beside those that do
    found["files"] = sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
    made.delete_adapter("default")
    found |= {"left": logits(made), "state": list(made.state_dict()), "adapters": sorted(wrapper._get_available_adapters())}
    other = peft.PeftModel.from_pretrained(tied(), folder / "b", adapter_name="z")
    found["loaded"] = [logits(other), *(m is None for m in (other.load_adapter(folder, "y"),))]
    other.set_adapter("y")
    found["y"] = logits(other)
    two = peft.get_peft_model(llama(), peft.TrainableTokensConfig(token_indices=[4, 9])).eval()  # with a tied head peft fails
    two.add_adapter("b", peft.TrainableTokensConfig(token_indices=[20]))
    jolt_all(two)
    two.set_adapter("b")
    jolt_all(two)
    found["alone b"] = (logits(two), list(two.state_dict()))
    two.base_model.set_adapter(["default", "b"])
    found["alone both"] = logits(two)
    two.merge_adapter()
    found["alone merged"] = logits(two)
    two.unmerge_adapter()
    two.base_model.set_adapter("default")
    two.delete_adapter("b")
    return found | {"alone left": (logits(two), list(two.state_dict()), [n for n, _ in two.named_modules()])}


def wrong_tokens(peft: Any, folder: Path) -> dict[str, Any]:
    def lora(**more: Any) -> Any:
        given = {"target_modules": ["q_proj"], "trainable_token_indices": [4]} | more
        return lambda: peft.get_peft_model(llama(), peft.LoraConfig(**given))

    nowhere = peft.TrainableTokensConfig(token_indices=[4], target_modules=["nothing"])
    found = {
        "layer": refused(lora(target_modules=["q_proj", "embed_tokens"])), "whole": refused(lora(modules_to_save=["model.embed_tokens"])),
        "apart": refused(lambda: peft.get_peft_model(tied(), peft.LoraConfig(
            target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [4], "lm_head": [5]}, ensure_weight_tying=True))),
        "nowhere": refused(lora(trainable_token_indices={"nothing": [4]})),
        "no target": refused(lambda: peft.get_peft_model(llama(), nowhere)),
    }  # fmt: skip
    random = peft.get_peft_model(llama(), peft.TrainableTokensConfig(token_indices=[4, 9], init_weights=False))
    return found | {"random": bool((logits(random) - logits(llama())).abs().max() > 1e-3)}


TOKEN_STORIES = {f.__name__: f for f in (alone, beside_lora, by_name, several_tokens, wrong_tokens)}
