"""What a script for peft does, as functions of the package: each is run with peft and with weft's face of it, and must tell the same.

A story gets the package, a model and a folder, and returns what a user would see: tensors, names, numbers, texts, errors.
"""

from __future__ import annotations

import io
import json
import re
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

IDS = torch.arange(3, 27).view(4, 6)


def fill(model: Any, seed: int = 11, size: float = 0.2) -> None:
    """The same numbers into every adapter tensor, in the order of their names: peft and weft draw first values differently."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for _, p in sorted((n, p) for n, p in model.named_parameters() if ".lora_" in n or ".modules_to_save." in n):
            p.copy_(torch.randn(p.shape) * size)


def logits(model: Any, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


def said(action: Any) -> list[str]:
    """The warnings that an action gives."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        action()
    return sorted({str(w.message)[:60] for w in found if "is_gradient_checkpointing" not in str(w.message)})


def refused(action: Any) -> tuple[str, str]:
    """The error that an action raises: whether a ValueError, a TypeError ..., and its first words."""
    try:
        action()
    except Exception as e:  # noqa: BLE001 (whatever it is, it is what a user sees)
        kind = next(k.__name__ for k in (ValueError, TypeError, KeyError, NotImplementedError, RuntimeError, Exception) if isinstance(e, k))
        return kind, str(e)[:50]
    return "nothing", ""


def begins(peft: Any, model: Any, folder: Path) -> dict[str, Any]:
    base = logits(model)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    made = peft.get_peft_model(model, config)
    line = io.StringIO()
    with redirect_stdout(line):
        made.print_trainable_parameters()
    fresh = torch.equal(logits(made), base)
    fill(made)
    q = made.base_model.model.model.layers[0].self_attn.q_proj
    return {
        "fresh": fresh, "line": line.getvalue(), "class": type(made).__name__, "tuner": type(made.base_model).__name__,
        "parameters": [(n, p.requires_grad, tuple(p.shape)) for n, p in made.named_parameters()], "state": list(made.state_dict()),
        "modules": [n for n, _ in made.named_modules()], "logits": logits(made), "active": made.active_adapters,
        "layer": (repr(q).partition("(")[0], q.r["default"], q.scaling["default"], q.lora_alpha["default"], q.merged, q.active_adapters,
                  q.in_features, q.out_features, q.weight.shape, q.bias),
        "delta": q.get_delta_weight("default").detach(), "status": vars(made.get_model_status()),
        "layers": [vars(s) for s in made.get_layer_status()][:2], "count": made.get_nb_trainable_parameters(),
    }  # fmt: skip


def trains_and_saves(peft: Any, model: Any, folder: Path) -> dict[str, Any]:
    config = peft.LoraConfig(r=3, target_modules=r".*\.(k_proj|up_proj)", task_type="CAUSAL_LM", use_rslora=True,
                             rank_pattern={"up_proj": 2})  # fmt: skip
    made = peft.get_peft_model(model, config)
    fill(made)
    optimiser = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = made(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    made.save_pretrained(folder)
    written = json.loads((folder / "adapter_config.json").read_text())
    card = (folder / "README.md").read_text()
    state = peft.get_peft_model_state_dict(made)
    return {
        "losses": torch.tensor(losses), "files": sorted(p.name for p in folder.iterdir()), "logits": logits(made.eval()), "config": written,
        "state": state, "card": re.findall(r"^(library_name|pipeline_tag|- lora|- PEFT .*)", card, re.M),
    }  # fmt: skip


def several(peft: Any, model: Any, folder: Path) -> dict[str, Any]:
    def config(r: int) -> Any:
        return peft.LoraConfig(r=r, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")

    made = peft.get_peft_model(model, config(2)).eval()
    made.add_adapter("other", config(5))
    fill(made)
    found: dict[str, Any] = {"default": logits(made), "active": made.active_adapter}
    trains = lambda: [n for n, p in made.named_parameters() if p.requires_grad]  # noqa: E731
    found["trains"] = trains()
    made.set_adapter("other")
    found |= {"other": logits(made), "trains after": trains()}
    made.base_model.set_adapter(["default", "other"])
    found |= {"both": logits(made), "both train": trains()}
    rows = ["other", "__base__", "default", "other"]
    found["rows"] = logits(made, adapter_names=rows)
    prompt = {"input_ids": IDS, "max_new_tokens": 4, "do_sample": False, "adapter_names": rows}
    found |= {"generated": made.generate(**prompt), "beams": made.generate(**prompt, num_beams=3)}
    found["errors"] = [
        refused(lambda: made.set_adapter("nobody")), refused(lambda: made.add_adapter("other", config(2))),
        refused(lambda: made.delete_adapter("nobody")), refused(lambda: logits(made, adapter_names=["nobody"] * 4)),
        refused(lambda: made.save_pretrained(folder, selected_adapters=["x"])),
        refused(lambda: made.train()(input_ids=IDS, adapter_names=rows)),
    ]  # fmt: skip
    made.eval()
    made.save_pretrained(folder)
    found["files"] = sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
    found["deleting"] = said(lambda: made.delete_adapter("other"))
    found |= {"left": logits(made), "configs": list(made.peft_config), "state": list(made.state_dict())}
    found["wrong length"] = refused(lambda: logits(made, adapter_names=["default"]))  # last: it leaves hooks behind in peft
    return found


def merges(peft: Any, model: Any, folder: Path) -> dict[str, Any]:
    made = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])).eval()
    made.add_adapter("b", peft.LoraConfig(r=2, target_modules=["down_proj"]))
    fill(made)
    layer = made.base_model.model.model.layers[1].mlp.down_proj
    made.merge_adapter()
    found = {"merged": logits(made), "merged_adapters": list(layer.merged_adapters), "status": made.get_model_status().merged_adapters}
    found["again"] = said(made.merge_adapter)
    with made.disable_adapter():
        found["disabled"] = logits(made)
    found["unmerging twice"] = said(lambda: (made.unmerge_adapter(), made.unmerge_adapter()))
    made.merge_adapter(adapter_names=["b"])
    found["set while merged"] = said(lambda: made.set_adapter("b"))
    found["deleting merged"] = (made.merge_adapter(), refused(lambda: made.delete_adapter("b")))[1]
    made.unmerge_adapter()
    found["as text"] = refused(lambda: made.merge_adapter(adapter_names="b"))
    plain = made.merge_and_unload(safe_merge=True, adapter_names=["default", "b"])
    return found | {"plain": logits(plain), "class": type(plain).__name__, "state": sorted(plain.state_dict())}


def whole_modules(peft: Any, model: Any, folder: Path) -> dict[str, Any]:
    config = peft.LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"], exclude_modules=["gate_proj"])
    made = peft.get_peft_model(model, config)
    fill(made)
    made.eval()
    found: dict[str, Any] = {"logits": logits(made), "parameters": [(n, p.requires_grad) for n, p in made.named_parameters()]}
    with made.disable_adapter():
        found["disabled"] = logits(made)
    made.save_pretrained(folder)
    found |= {"state": peft.get_peft_model_state_dict(made), "targets": sorted(made.peft_config["default"].target_modules)}
    found["plain"] = logits(made.merge_and_unload())
    return found


def injected(peft: Any, model: Any, folder: Path) -> dict[str, Any]:
    config = peft.LoraConfig(r=2, target_modules=["v_proj"], layers_to_transform=[1], layers_pattern="layers")
    made = peft.inject_adapter_in_model(config, model, adapter_name="x")
    fill(made)
    state = peft.get_peft_model_state_dict(made, adapter_name="x")
    result = peft.set_peft_model_state_dict(made, {k: v + 1 for k, v in state.items()}, adapter_name="x")
    return {"same": made is model, "logits": logits(made), "state": state, "keys": list(made.state_dict()),
            "unexpected": result.unexpected_keys, "trains": [n for n, p in made.named_parameters() if p.requires_grad]}  # fmt: skip


def mistakes(peft: Any, model: Any, folder: Path) -> dict[str, Any]:
    lora, get = peft.LoraConfig, peft.get_peft_model
    folder.mkdir(exist_ok=True)
    (folder / "file").write_text("")
    actions = {
        "no such target": lambda: get(model, lora(target_modules=["nothing"])),
        "rank": lambda: get(model, lora(r=0, target_modules=["q_proj"])),
        "task": lambda: lora(task_type="NO_SUCH_TASK"), "layers with text": lambda: lora(target_modules="x", layers_to_transform=[1]),
        "pattern alone": lambda: lora(target_modules=["x"], layers_pattern="h"), "bias": lambda: lora(lora_bias=True, use_dora=True),
        "all out": lambda: get(model, lora(target_modules=["q_proj"], exclude_modules=r".*")),
        "unknown start": lambda: get(model, lora(target_modules=["q_proj"], init_lora_weights="no_such")),
        "module kind": lambda: get(model, lora(target_modules=["norm"])),
        "no adapter there": lambda: peft.PeftConfig.from_pretrained(folder),
        "no adapter for a model": lambda: peft.PeftModel.from_pretrained(model, folder),
        "adalora": lambda: peft.AdaLoraConfig(), "ia3": lambda: peft.IA3Config(target_modules=["a"], feedforward_modules=["b"]),
        "oft": lambda: peft.OFTConfig(r=2, oft_block_size=4), "eva": lambda: peft.EvaConfig(rho=0.5),
        "text": lambda: peft.PromptTuningConfig(prompt_tuning_init="TEXT"), "auto": lambda: peft.AutoPeftModelForCausalLM(),
        "parameters": lambda: lora(target_parameters="x"), "not layers": lambda: peft.get_layer_status(torch.nn.Linear(1, 1)),
    }  # fmt: skip
    kinds = {name: refused(action) for name, action in actions.items()}
    return {"kinds": {n: k for n, (k, _) in kinds.items()},
            "texts": {n: t for n, (_, t) in kinds.items() if n not in ("module kind", "unknown start")}}  # fmt: skip


STORIES = {f.__name__: f for f in (begins, trains_and_saves, several, merges, whole_modules, injected, mistakes)}
