"""More stories (see stories.py): other methods, other layers, tasks with a head, helpers. Each makes its own models."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.compat.stories import IDS, fill, logits, refused, said
from tests.conftest import ConvNet, Plain, gpt2, llama

X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_labels=3,
        max_position_embeddings=64,
    )
    return transformers.BertForSequenceClassification(config).eval()


def t5() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config).eval()


def jolt_all(model: Any) -> None:
    """The same numbers onto every parameter that trains, by the order of names."""
    torch.manual_seed(5)
    with torch.no_grad():
        for _, p in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
            p.add_(torch.randn(p.shape) * 0.1)


def whole_life(peft: Any, made: Any, call: Any, folder: Path, build: Any) -> dict[str, Any]:
    """From the start to the plain model, for any method."""
    found: dict[str, Any] = {"start": call(made)}
    jolt_all(made)
    found |= {
        "parameters": [(n, p.requires_grad, tuple(p.shape)) for n, p in made.named_parameters()], "state": list(made.state_dict()),
        "modules": [n for n, _ in made.named_modules()], "moved": call(made), "saved": peft.get_peft_model_state_dict(made),
        "status": vars(made.get_model_status()),
    }  # fmt: skip
    with made.disable_adapter():
        found["disabled"] = call(made)
    made.save_pretrained(folder)
    found["read"] = call(peft.PeftModel.from_pretrained(build(), folder))
    found["thin"] = call(peft.PeftModel.from_pretrained(build(), folder, low_cpu_mem_usage=True))
    made.merge_adapter()
    found["merged"] = call(made)
    made.unmerge_adapter()
    found |= {"unmerged": call(made), "unloaded": call(copy.deepcopy(made).unload()), "plain": call(made.merge_and_unload())}
    return found


def ia3(peft: Any, folder: Path) -> dict[str, Any]:
    made = peft.get_peft_model(llama(), peft.IA3Config(task_type="CAUSAL_LM"))
    found = whole_life(peft, made.eval(), logits, folder, llama)
    layer = peft.get_peft_model(llama(), peft.IA3Config(target_modules=["q_proj", "up_proj"], feedforward_modules=["up_proj"]))
    q = layer.base_model.model.model.layers[0].self_attn.q_proj
    return found | {"layer": (repr(q).partition("(")[0], q.ia3_l["default"].shape, q.is_feedforward)}


def ia3_weighted(peft: Any, folder: Path) -> dict[str, Any]:
    made = peft.get_peft_model(llama(), peft.IA3Config(task_type="CAUSAL_LM")).eval()
    made.add_adapter("b", peft.IA3Config(task_type="CAUSAL_LM"))
    made.base_model.set_requires_grad(["default", "b"])
    jolt_all(made)
    made.add_weighted_adapter(["default", "b"], [0.7, -0.3], "both")
    made.set_adapter("both")
    unknown = refused(lambda: made.add_weighted_adapter(["nobody"], [1.0], "c"))
    return {"both": logits(made), "saved": peft.get_peft_model_state_dict(made, adapter_name="both"), "unknown": unknown}


def two_norms(peft: Any, folder: Path) -> dict[str, Any]:
    made = peft.get_peft_model(llama(), peft.LNTuningConfig(task_type="CAUSAL_LM")).eval()
    made.add_adapter("b", peft.LNTuningConfig(task_type="CAUSAL_LM"))
    made.base_model.set_adapter(["default", "b"])
    return {"both": refused(lambda: logits(made))}


def norms(peft: Any, folder: Path) -> dict[str, Any]:
    made = peft.get_peft_model(llama(), peft.LNTuningConfig(task_type="CAUSAL_LM"))
    return whole_life(peft, made.eval(), logits, folder, llama)


def others(peft: Any, folder: Path) -> dict[str, Any]:
    """LoHa, LoKr and OFT, and what a LoHa becomes as a LoRA."""
    found: dict[str, Any] = {}
    targets = ["q_proj", "up_proj"]
    configs = {
        "loha": peft.LoHaConfig(r=2, alpha=3, target_modules=targets, task_type="CAUSAL_LM"),
        "lokr": peft.LoKrConfig(r=2, target_modules=targets, layers_to_transform=[1], layers_pattern="layers", task_type="CAUSAL_LM"),
        "oft": peft.OFTConfig(oft_block_size=8, target_modules=targets, task_type="CAUSAL_LM"),
    }
    for name, config in configs.items():
        made = peft.get_peft_model(llama(), config).eval()
        torch.manual_seed(5)
        with torch.no_grad():
            for _, p in sorted((n, p) for n, p in made.named_parameters() if p.requires_grad):
                p.copy_(torch.randn(p.shape) * 0.2)
        start = whole_life(peft, made, logits, folder / name, llama)
        found[name] = {k: v for k, v in start.items() if not (name == "oft" and k in ("modules", "state"))}
        if name == "loha":
            made = peft.get_peft_model(llama(), copy.deepcopy(config)).eval()
            fill(made)
            with torch.no_grad():
                for _, p in sorted((n, p) for n, p in made.named_parameters() if p.requires_grad):
                    p.copy_(torch.randn(p.shape) * 0.2)
            peft.save_as_lora(folder / "lora", made, 4)
            as_lora = peft.PeftModel.from_pretrained(llama(), folder / "lora")
            lora, _ = peft.convert_to_lora(made, 0.9)
            found["as lora"] = (logits(as_lora), sorted(lora.rank_pattern.values()), refused(lambda m=made: peft.convert_to_lora(m, 1.5)))
    return found


def adalora(peft: Any, folder: Path) -> dict[str, Any]:
    config = peft.AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=1, total_step=6, target_modules=["q_proj", "up_proj"],
                                orth_reg_weight=0.1, task_type="CAUSAL_LM")  # fmt: skip
    made = peft.get_peft_model(llama(), config).train()
    fill(made)
    layer = made.base_model.model.model.layers[0].self_attn.q_proj
    optimiser = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.05)
    losses, left = [], []
    for step in range(1, 7):
        loss = made(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimiser.step()
        if step < 5:
            made.base_model.update_and_allocate(step)
        optimiser.zero_grad()
        losses.append(loss.item())
        left.append(int((layer.lora_E["default"] != 0).sum()))
    found = {"losses": torch.tensor(losses), "left": left, "layer": (repr(layer).partition("(")[0], layer.lora_A["default"].shape)}
    made.eval()
    found |= {"moved": logits(made), "names": [n for n, _ in made.named_parameters()]}
    made.save_pretrained(folder)
    return found | {"read": logits(peft.PeftModel.from_pretrained(llama(), folder)), "plain": logits(made.merge_and_unload())}


def vera(peft: Any, folder: Path) -> dict[str, Any]:
    made = peft.get_peft_model(llama(), peft.VeraConfig(r=6, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM"))
    found = whole_life(peft, made.eval(), logits, folder, llama)
    layer = peft.get_peft_model(llama(), peft.VeraConfig(r=6)).base_model.model.model.layers[0].self_attn.q_proj
    kept = ("moved", "saved", "disabled", "read", "thin", "merged", "plain", "unloaded", "unmerged")
    return {k: found[k] for k in kept} | {"layer": (repr(layer).partition("(")[0], layer.vera_lambda_d["default"].shape)}


def conv1d(peft: Any, folder: Path) -> dict[str, Any]:
    made = peft.get_peft_model(gpt2(), peft.LoraConfig(r=2, fan_in_fan_out=True, task_type="CAUSAL_LM"))
    fill(made)
    return whole_life(peft, made.eval(), logits, folder, gpt2)


def dora(peft: Any, folder: Path) -> dict[str, Any]:
    config = peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    made = peft.get_peft_model(llama(), config).eval()
    fill(made)
    layer = made.base_model.model.model.layers[0].mlp.up_proj
    found = whole_life(peft, made, logits, folder, llama)
    return found | {"magnitude": layer.lora_magnitude_vector["default"].weight.shape, "use": layer.use_dora}


def convolutions(peft: Any, folder: Path) -> dict[str, Any]:
    def build() -> Any:
        torch.manual_seed(0)
        net = ConvNet().eval()
        net.first.padding_mode, net.second.dilation, net.second.padding = "zeros", (1, 1), (1, 1)  # where peft's own are at fault
        net.first._reversed_padding_repeated_twice = [0, 0, 0, 0]
        return net

    made = peft.get_peft_model(build(), peft.LoraConfig(r=4, target_modules=["first", "second", "out"]))
    fill(made)
    return whole_life(peft, made.eval(), lambda m: m(X).detach(), folder, build)


def embeddings(peft: Any, folder: Path) -> dict[str, Any]:
    def build() -> Any:
        torch.manual_seed(0)
        return Plain().eval()

    made = peft.get_peft_model(build(), peft.LoraConfig(r=3, target_modules=["embed", "up"], modules_to_save=["norm"]), adapter_name="x")
    fill(made)
    found = {"moved": made(IDS).detach(), "state": peft.get_peft_model_state_dict(made, adapter_name="x"), "keys": list(made.state_dict())}
    made.save_pretrained(folder, safe_serialization=False)
    found["files"] = sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
    again = peft.PeftModel.from_pretrained(build(), folder / "x", adapter_name="y", is_trainable=True)
    return found | {"read": again(IDS).detach(), "trains": [n for n, p in again.named_parameters() if p.requires_grad],
                    "plain": again.merge_and_unload()(IDS).detach()}  # fmt: skip


def biases(peft: Any, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for bias in ("all", "lora_only"):
        torch.manual_seed(0)
        made = peft.get_peft_model(Plain().eval(), peft.LoraConfig(r=2, target_modules=["up"], bias=bias))
        fill(made)
        jolt_all(made)
        found[bias] = ([n for n, p in made.named_parameters() if p.requires_grad], made(IDS).detach(), peft.get_peft_model_state_dict(made))
        found[bias + " twice"] = refused(lambda m=made: m.add_adapter("b", peft.LoraConfig(target_modules=["up"], bias="all")))
        found[bias + " off"] = said(made.base_model.disable_adapter_layers)
    found["unknown"] = refused(lambda: peft.get_peft_model(Plain(), peft.LoraConfig(target_modules=["up"], bias="sometimes")))
    return found


def classifier(peft: Any, folder: Path) -> dict[str, Any]:
    made = peft.get_peft_model(bert(), peft.LoraConfig(r=2, task_type="SEQ_CLS"))
    fill(made)
    made.eval()
    labels = torch.tensor([0, 1, 2, 0])
    made(input_ids=IDS, labels=labels).loss.backward()
    found = {"logits": logits(made), "class": type(made).__name__, "saved": made.modules_to_save,
             "grads": sorted(n for n, p in made.named_parameters() if p.grad is not None)}  # fmt: skip
    made.save_pretrained(folder)
    again = peft.PeftModel.from_pretrained(bert(), folder)
    return found | {"read": logits(again), "read class": type(again).__name__, "state": peft.get_peft_model_state_dict(again)}


def seq2seq(peft: Any, folder: Path) -> dict[str, Any]:
    made = peft.get_peft_model(t5(), peft.LoraConfig(r=2, task_type="SEQ_2_SEQ_LM")).eval()
    made.add_adapter("b", peft.LoraConfig(r=3, target_modules=["q", "wo"], task_type="SEQ_2_SEQ_LM"))
    fill(made)
    rows = ["b", "__base__", "default", "default"]
    return {"loss": made(input_ids=IDS, labels=IDS).loss.detach(), "class": type(made).__name__,
            "rows": made(input_ids=IDS, decoder_input_ids=IDS, adapter_names=rows).logits.detach(),
            "beams": made.generate(input_ids=IDS, num_beams=2, max_new_tokens=5, adapter_names=rows)}  # fmt: skip


def mixed(peft: Any, folder: Path) -> dict[str, Any]:
    made = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), mixed=True)
    made.add_adapter("b", peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    made.set_adapter(["default", "b"])
    fill(made)
    found: dict[str, Any] = {"both": logits(made.eval()), "active": made.active_adapters, "types": sorted(made.peft_config)}
    found["errors"] = [refused(lambda: made.set_adapter("nobody")), refused(lambda: made.save_pretrained(folder)),
                       refused(lambda: made.add_adapter("c", peft.PrefixTuningConfig())), refused(made.get_model_status)]  # fmt: skip
    with made.disable_adapter():
        found["disabled"] = logits(made)
    return found | {"plain": logits(made.merge_and_unload())}


def scales(peft: Any, folder: Path) -> dict[str, Any]:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], alpha_pattern={"layers.1.self_attn.q_proj": 2})
    made = peft.get_peft_model(llama(), config)
    fill(made)
    made.eval()
    found: dict[str, Any] = {"scaling": [m.scaling["default"] for m in made.modules() if hasattr(m, "lora_A")]}
    with peft.helpers.rescale_adapter_scale(made, 0.5):
        found["half"] = logits(made)
    layer = made.base_model.model.model.layers[0].self_attn.q_proj
    layer.scale_layer(3.0)
    found |= {"scaled": logits(made), "to": layer.scaling["default"]}
    layer.unscale_layer()
    layer.set_scale("default", 2)
    found |= {"set": logits(made), "at": layer.scaling["default"],
              "wrong": refused(lambda: peft.helpers.rescale_adapter_scale(made, "a").__enter__())}  # fmt: skip
    layer.lora_B["default"].weight.data *= 2
    layer.lora_A["default"].weight = torch.nn.Parameter(torch.ones(4, 32))
    return found | {"written": logits(made), "delta": layer.get_delta_weight("default").detach()}


def weighted(peft: Any, folder: Path) -> dict[str, Any]:
    made = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")).eval()
    made.add_adapter("b", peft.LoraConfig(r=4, lora_alpha=3, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    made.add_adapter("c", peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    fill(made)
    found: dict[str, Any] = {}
    for how in ("linear", "cat", "svd", "ties", "magnitude_prune", "ties_svd", "dare_linear", "dare_ties_svd"):
        torch.manual_seed(1)
        made.add_weighted_adapter(["default", "b"], [0.7, -0.4], how, combination_type=how, density=0.6)
        made.set_adapter(how)
        config = made.peft_config[how]
        found[how] = (0 if "dare" in how else logits(made), config.r, config.lora_alpha, sorted(config.target_modules))
    made.add_weighted_adapter(["c"], [2.0], "alone", combination_type="svd")
    made.set_adapter("alone")
    found["alone"] = logits(made)
    add = made.add_weighted_adapter
    return found | {"errors": [refused(lambda: add(["x"], [1], "y")),
                               refused(lambda: add(["b", "c"], [1, 1], "y", combination_type="linear")),
                               refused(lambda: add(["b", "c"], [1, 1], "y", combination_type="wrong"))],
                    "trains": [n for n, p in made.named_parameters() if p.requires_grad]}  # fmt: skip


def prompts(peft: Any, folder: Path) -> dict[str, Any]:
    """Without the logits of the virtual tokens, which weft leaves out, and padded on the right: on the left weft moves the positions."""
    found: dict[str, Any] = {}
    configs = {
        "prompt": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "prefix": peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        "projected": peft.PrefixTuningConfig(num_virtual_tokens=2, prefix_projection=True, encoder_hidden_size=12, task_type="CAUSAL_LM"),
        "encoded": peft.PromptEncoderConfig(num_virtual_tokens=2, encoder_hidden_size=8, task_type="CAUSAL_LM"),
    }
    mask = torch.ones_like(IDS)
    mask[0, -2:] = 0
    for name, config in configs.items():
        made = peft.get_peft_model(llama(), config).eval()
        jolt_all(made)
        torch.manual_seed(2)
        with torch.no_grad():
            for _, p in sorted((n, p) for n, p in made.named_parameters() if "prompt_encoder" in n):
                p.copy_(torch.randn(p.shape) * 0.3)
        tell = lambda m: logits(m, attention_mask=mask)[:, -IDS.shape[1] :] * mask[..., None]  # noqa: E731
        loss = made(input_ids=IDS, attention_mask=mask, labels=IDS.masked_fill(mask == 0, -100)).loss
        loss.backward()
        grads = {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}
        found[name] = {"logits": tell(made), "loss": loss.detach(), "grads": grads, "count": made.get_nb_trainable_parameters(),
                       "state": peft.get_peft_model_state_dict(made), "names": sorted(set(made.state_dict()) - {"word_embeddings.weight"}),
                       "class": type(made).__name__}  # fmt: skip
        with made.disable_adapter():
            found[name]["disabled"] = tell(made)
        found[name]["generated"] = made.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
        made.save_pretrained(folder / name)
        again = peft.PeftModel.from_pretrained(llama(), folder / name)
        found[name] |= {"read": tell(again), "config": {k: str(v) for k, v in again.peft_config["default"].to_dict().items()}}
        made.add_adapter("b", copy.deepcopy(configs[name]))
        found[name] |= {"still": tell(made), "active": made.active_adapters}
        made.set_adapter("b")
        made.delete_adapter("b")
        found[name]["left"] = tell(made)
    found["errors"] = [refused(lambda: peft.get_layer_status(made)), refused(lambda: made.set_requires_grad("default")),
                       refused(lambda: peft.get_peft_model(llama(), peft.PromptTuningConfig(num_virtual_tokens=2)))]  # fmt: skip
    return found


def swapped(peft: Any, folder: Path) -> dict[str, Any]:
    def config(r: int) -> Any:
        return peft.LoraConfig(r=r, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")

    other = peft.get_peft_model(llama(), config(6))
    fill(other, seed=3)
    other.save_pretrained(folder)
    made = peft.get_peft_model(llama(), config(4)).eval()
    fill(made)
    importlib.import_module(f"{peft.__name__}.utils.hotswap").hotswap_adapter(made, str(folder), "default")
    return {"swapped": logits(made), "as": logits(other.eval())}


def half(peft: Any, folder: Path) -> dict[str, Any]:
    config = lambda: peft.LoraConfig(r=2, target_modules=["q_proj"])  # noqa: E731
    wide = peft.get_peft_model(llama(dtype=torch.bfloat16), config())
    thin = peft.get_peft_model(llama(dtype=torch.bfloat16), config(), autocast_adapter_dtype=False)
    double = peft.get_peft_model(llama(dtype=torch.float64), config())
    found: dict[str, Any] = {}
    for name, made in (("wide", wide), ("thin", thin), ("double", double)):
        found[name + " of"] = sorted({str(p.dtype) for n, p in made.named_parameters() if "lora" in n})
    fill(double)
    peft.cast_mixed_precision_params(wide, torch.float16)
    frozen = peft.prepare_model_for_kbit_training(llama(dtype=torch.bfloat16))
    return found | {"cast": sorted({(p.requires_grad, str(p.dtype)) for p in wide.parameters()}), "double": logits(double),
                    "frozen": sorted({(p.requires_grad, str(p.dtype)) for p in frozen.parameters()})}  # fmt: skip


def files(peft: Any, folder: Path) -> dict[str, Any]:
    """What a newer peft wrote, an older one, an unknown one; and the loading of base and adapter in one call."""
    llama().save_pretrained(folder / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    made = peft.get_peft_model(base, peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    fill(made)
    made.save_pretrained(folder / "adapter")
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")
    found: dict[str, Any] = {"auto": logits(auto), "class": type(auto).__name__,
                             "other task": refused(lambda: peft.AutoPeftModelForSeq2SeqLM.from_pretrained(folder / "adapter"))}  # fmt: skip
    config = folder / "adapter" / "adapter_config.json"
    text = config.read_text()
    config.write_text(text.replace('"bias"', '"field_of_tomorrow": 1,\n  "bias"'))
    found["newer"] = said(lambda: peft.PeftConfig.from_pretrained(folder / "adapter"))
    config.write_text(text)
    weights = peft.load_peft_weights(str(folder / "adapter"))
    check = peft.helpers.check_if_peft_model
    found |= {"weights": weights, "is": check(str(folder / "adapter")), "not": check(str(folder))}
    result = peft.set_peft_model_state_dict(made, {k.replace("layers.0", "layers.9"): v for k, v in weights.items()})
    found["keys"] = (sorted(k for k in result.missing_keys if "lora" in k), sorted(result.unexpected_keys))
    wrong = {k: v[:1] for k, v in weights.items()}
    found["shape"] = refused(lambda: peft.set_peft_model_state_dict(made, wrong))
    return found | {"ignored": said(lambda: peft.set_peft_model_state_dict(made, wrong, ignore_mismatched_sizes=True)),
                    "base": peft.get_base_model_state_dict(made),
                    "loaded": said(lambda: made.load_adapter(str(folder / "adapter"), "second")),
                    "second": (made.set_adapter("second"), logits(made.eval()))[1]}  # fmt: skip


TOLD = (
    ia3, ia3_weighted, norms, two_norms,
    adalora, others, vera, conv1d, dora, convolutions, embeddings, biases, classifier, seq2seq, mixed, scales, weighted,
    prompts,
    swapped, half,
    files,
)  # fmt: skip
MORE = {f.__name__: f for f in TOLD}
