"""Stories (see stories.py) of LoRA on parameters: fused experts, a router's weight, a layer's weight under its own name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.compat.stories import fill, refused
from tests.parity.families import FAMILIES

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def _base(family: str) -> Any:
    torch.manual_seed(0)
    return FAMILIES[family].make().eval()


def _logits(model: Any, family: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**FAMILIES[family].inputs()).logits


def _whole_life(peft: Any, folder: Path, family: str, modules: Any, parameters: Any, **more: Any) -> dict[str, Any]:
    def config(r: int) -> Any:
        return peft.LoraConfig(r=r, lora_alpha=6, target_modules=copy.copy(modules), target_parameters=copy.copy(parameters),
                               task_type="CAUSAL_LM", **copy.deepcopy(more))  # fmt: skip

    made = peft.get_peft_model(_base(family), config(2)).eval()
    found: dict[str, Any] = {
        "names": sorted((n, p.requires_grad, tuple(p.shape)) for n, p in made.named_parameters()), "state": sorted(made.state_dict()),
        "modules": [n for n, _ in made.named_modules()], "start": _logits(made, family),
    }  # fmt: skip
    fill(made)
    status = copy.deepcopy([vars(made.get_model_status()), *map(vars, made.get_layer_status())])
    found |= {"moved": _logits(made, family), "saved": peft.get_peft_model_state_dict(made), "status": status}
    for layer in made.modules():
        if type(layer).__name__ == "ParamWrapper":
            found[f"view of {layer.parameter_name}"] = (
                layer.num_experts, dict(layer.r), dict(layer.scaling), dict(layer.lora_alpha), layer.in_features, layer.out_features,
                layer.get_delta_weight("default").detach(), layer.get_param().detach().clone(), repr(layer)[:60], layer.active_adapters,
            )  # fmt: skip
    with made.disable_adapter():
        found["disabled"] = _logits(made, family)
    made.save_pretrained(folder)
    told = json.loads((folder / "adapter_config.json").read_text())
    found["config"] = [sorted(told[k] or []) if isinstance(told[k], list) else told[k]
                       for k in ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern", "r")]  # fmt: skip
    for thin in (False, True):
        found[f"read {thin}"] = _logits(peft.PeftModel.from_pretrained(_base(family), folder, low_cpu_mem_usage=thin), family)
    made.merge_adapter()
    found["merged"] = _logits(made, family)
    made.unmerge_adapter()
    found["unmerged"] = _logits(made, family)
    made.add_adapter("b", config(3))
    fill(made, 5)
    made.set_adapter("b")
    found |= {"b": _logits(made, family), "b trains": sorted(n for n, p in made.named_parameters() if p.requires_grad)}
    made.base_model.set_adapter(["default", "b"])
    found |= {"both": _logits(made, family), "unloaded": _logits(copy.deepcopy(made).unload(), family)}
    made.delete_adapter("b")
    made.train()
    inputs = FAMILIES[family].inputs()
    made(**inputs, labels=inputs["input_ids"]).loss.backward()
    found["gradients"] = {n: p.grad for n, p in made.named_parameters() if p.grad is not None}
    return found | {"plain": _logits(made.eval().merge_and_unload(safe_merge=True), family)}


def experts(peft: Any, folder: Path) -> dict[str, Any]:
    patterns = {"rank_pattern": {r".*gate_up_proj": 3}, "alpha_pattern": {r".*down_proj": 5}}
    return {
        "both": _whole_life(peft, folder / "a", "Mixtral", [], BOTH),
        "and layers": _whole_life(peft, folder / "b", "Mixtral", ["q_proj"], BOTH, **patterns),
        "one": _whole_life(peft, folder / "c", "Qwen3-MoE", [], BOTH[1:], use_rslora=True),
        "router": _whole_life(peft, folder / "d", "Mixtral", None, ["gate.weight"]),
        "a layer's": _whole_life(peft, folder / "e", "Mixtral", [], ["q_proj.weight"]),
    }


def old_names(peft: Any, folder: Path) -> dict[str, Any]:
    """Layers that a model had before its experts were fused: named in a configuration, and as they stand in a file."""
    found = {
        "list": _whole_life(peft, folder / "a", "Mixtral", ["w1", "w2", "w3", "q_proj"], None),
        "all": _whole_life(peft, folder / "b", "Mixtral", "all-linear", None),
        "text": _whole_life(peft, folder / "c", "Mixtral", r".*\.(w1|w3|v_proj)", None),
        "Qwen": _whole_life(peft, folder / "d", "Qwen3-MoE", ["gate_proj", "up_proj", "down_proj"], None),
        "part": refused(lambda: peft.get_peft_model(_base("Mixtral"), peft.LoraConfig(target_modules=["w1"]))),
    }
    for named in (["w1", "w2", "w3"], ["w2"]):
        torch.manual_seed(3)
        sizes, state = {"w1": (24, 16), "w3": (24, 16), "w2": (16, 24)}, {}
        for layer in range(2):
            for e in range(4):
                for name in named:
                    at = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{e}.{name}.lora_"
                    out, inside = sizes[name]
                    state |= {f"{at}A.weight": torch.randn(2, inside) / 3, f"{at}B.weight": torch.randn(out, 2) / 3}
        old = folder / "-".join(named)
        peft.LoraConfig(r=2, lora_alpha=6, target_modules=named, task_type="CAUSAL_LM").save_pretrained(old)
        save_file(state, old / "adapter_model.safetensors")
        made = peft.PeftModel.from_pretrained(_base("Mixtral"), old)
        found |= {f"read {named}": _logits(made, "Mixtral"), f"state {named}": peft.get_peft_model_state_dict(made)}
    return found


def experts_refused(peft: Any, folder: Path) -> dict[str, Any]:
    def get(**more: Any) -> tuple[str, str]:
        given = {"target_modules": [], "target_parameters": BOTH} | more
        return refused(lambda: peft.get_peft_model(_base("Mixtral"), peft.LoraConfig(**given)))

    made = peft.get_peft_model(_base("Mixtral"), peft.LoraConfig(target_modules=[], target_parameters=BOTH))
    top = torch.nn.Linear(3, 3)
    return {
        "dropout": get(lora_dropout=0.1), "dora": get(use_dora=True), "bias": get(lora_bias=True), "fan": get(fan_in_fan_out=True),
        "twice": get(target_modules=["q_proj"], target_parameters=["q_proj.weight"])[0], "none": get(target_parameters=["no_such"]),
        "one dimension": get(target_parameters=["input_layernorm.weight"]),
        "others": refused(lambda: made.add_adapter("b", peft.LoraConfig(target_modules=[], target_parameters=BOTH[:1]))),
        "top": refused(lambda: peft.get_peft_model(top, peft.LoraConfig(target_modules=[], target_parameters=["weight"]))),
        "state": refused(lambda: peft.inject_adapter_in_model(
            peft.LoraConfig(target_modules=[], target_parameters=BOTH), _base("Mixtral"), state_dict={"x.lora_A.weight": torch.ones(1)})),
        "weighted": refused(lambda: made.base_model.add_weighted_adapter(["default"], [1.0], "c")),
    }  # fmt: skip


EXPERTS = {f.__name__: f for f in (experts, old_names, experts_refused)}
