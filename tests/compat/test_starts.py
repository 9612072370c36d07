"""LoRA's beginnings in the face: side by side with peft where peft can run here, against weft's own arithmetic where it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import weft
import weft.compat.peft as face
from tests.compat.stories import IDS, fill, logits
from tests.compat.stories_starts import STARTS
from tests.compat.test_side_by_side import same
from tests.conftest import llama
from weft.compat.peft.eva import get_eva_state_dict
from weft.compat.peft.incremental_pca import IncrementalPCA
from weft.quant import dense, roundtrip

TARGETS = ["q_proj", "k_proj", "o_proj", "down_proj"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("story", STARTS)
def test_a_start_tells_the_same(story: str, tmp_path: Path) -> None:
    same(STARTS[story](peft, tmp_path / "peft"), STARTS[story](face, tmp_path / "weft"), story)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["pissa", "pissa_niter_16", "olora"])
def test_each_reads_the_other_s_start(how: str, tmp_path: Path) -> None:
    def config(package: Any) -> Any:
        return package.LoraConfig(r=4, lora_alpha=6, init_lora_weights=how, target_modules=TARGETS, task_type="CAUSAL_LM")

    for package in (peft, face):
        torch.manual_seed(4)
        made = package.get_peft_model(llama(), config(package)).eval()
        name = package.__name__
        made.peft_config["default"].init_lora_weights = True
        made.save_pretrained(tmp_path / name / "first")
        made.peft_config["default"].init_lora_weights = how
        for _, p in sorted((n, p) for n, p in made.named_parameters() if "lora_A" in n):
            p.data *= 0.5
        out = logits(made)
        made.save_pretrained(tmp_path / name / "own")
        made.save_pretrained(tmp_path / name / "plain", path_initial_model_for_weight_conversion=str(tmp_path / name / "first"))
        for reader in (peft, face):
            for folder in ("plain",) if "niter" in how else ("own", "plain"):  # rounds start at random: the changed base is another one
                read = logits(reader.PeftModel.from_pretrained(llama(), tmp_path / name / folder))
                assert torch.allclose(read, out, atol=2e-5), (name, reader.__name__, folder)
        with torch.no_grad():
            assert torch.allclose(weft.load(llama(), tmp_path / name / "plain")(IDS).logits, out, atol=2e-5)


def test_what_peft_drops_or_breaks_off_at(tmp_path: Path) -> None:
    """An embedding and a whole module go into the plain file too; an adapter without memory takes its start out of the base as well."""
    config = face.LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj", "embed_tokens"], modules_to_save=["norm"])
    made = face.get_peft_model(llama(), config).eval()
    assert torch.allclose(logits(made), logits(llama()), atol=1e-6)
    config.init_lora_weights = True
    made.save_pretrained(tmp_path / "first", save_embedding_layers=False)
    config.init_lora_weights = "pissa"
    fill(made)
    made.save_pretrained(tmp_path / "own", save_embedding_layers=False)
    made.save_pretrained(tmp_path / "plain", save_embedding_layers=False, path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    for folder in ("own", "plain"):
        for thin in (False, True):
            read = face.PeftModel.from_pretrained(llama(), tmp_path / folder, low_cpu_mem_usage=thin)
            assert torch.allclose(logits(read), logits(made), atol=1e-4), (folder, thin)


def test_what_cannot_start_so_leaves_the_base_alone() -> None:
    for more, kind, said in (
        (dict(target_modules=["q_proj", "k_proj"], r=20), ValueError, "no more than 16 directions"),
        (dict(target_modules=["q_proj"], init_lora_weights="no_such"), ValueError, "Unknown initialization"),
    ):
        model = llama()
        with pytest.raises(kind, match=said):
            face.get_peft_model(model, face.LoraConfig(**({"init_lora_weights": "pissa"} | more)))
        assert torch.equal(logits(model), logits(llama()))
    packed = weft.load_base("embedded", base="nf4", device="cpu")
    with pytest.raises(TypeError, match="is packed"):
        face.get_peft_model(packed, face.LoraConfig(init_lora_weights="pissa", target_modules=["q_proj"]))


@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_leaves_what_packing_keeps_and_holds_what_it_lost(bits: int, tmp_path: Path) -> None:
    def config(rounds: int) -> face.LoraConfig:
        return face.LoraConfig(r=4, lora_alpha=12, init_lora_weights="loftq", target_modules=["q_proj"], task_type="CAUSAL_LM",
                               loftq_config=face.LoftQConfig(loftq_bits=bits, loftq_iter=rounds))  # fmt: skip

    W = llama().model.layers[0].self_attn.q_proj.weight.detach()
    once = roundtrip(W, {4: "nf4", 8: "int8"}[bits])
    off = []
    for rounds in (1, 5):
        made = face.get_peft_model(llama(), config(rounds)).eval()
        q = made.base_model.model.model.layers[0].self_attn.q_proj
        off.append(float((q.base_layer.weight + q.get_delta_weight("default") - W).detach().norm() / W.norm()))
        assert torch.equal(q.base_layer.weight, once) is (rounds == 1)
        fill(made)
        made.save_pretrained(tmp_path / str(rounds))
        assert torch.equal(logits(face.PeftModel.from_pretrained(llama(), tmp_path / str(rounds))), logits(made))
    plain = float((once - W).norm() / W.norm())
    assert off[0] < 0.95 * plain and off[1] < off[0]


def test_a_packed_base_gets_factors_for_what_it_lost(tmp_path: Path) -> None:
    whole = weft.load_base("embedded", device="cpu")
    whole.save_pretrained(tmp_path / "whole")
    made = face.get_peft_model(weft.load_base("embedded", base="nf4", device="cpu"),
                               face.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()  # fmt: skip
    seen: list[str] = []

    def keep(model: Any, path: str) -> bool:
        seen.append(path)
        return len(seen) != 1

    face.replace_lora_weights_loftq(made, tmp_path / "whole", callback=keep)
    layers = [m for m in made.modules() if hasattr(m, "lora_A")]
    assert len(seen) == len(layers) and not layers[0].lora_B["default"].weight.any()
    for path, layer in list(zip(seen, layers, strict=True))[1:]:
        W = whole.get_submodule(path).weight.float()
        lost = W - dense(layer.get_base_layer()).float()
        assert (lost - layer.get_delta_weight("default")).norm() < 0.97 * lost.norm()
    with pytest.raises(ValueError, match="no packed linear layer"):
        face.replace_lora_weights_loftq(face.get_peft_model(llama(), face.LoraConfig(target_modules=["q_proj"])), tmp_path / "whole")


def batches() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(5)
    found = [{"input_ids": torch.randint(3, 90, (8, 16)), "attention_mask": torch.ones(8, 16, dtype=torch.long)} for _ in range(6)]
    for batch in found:
        batch["attention_mask"][0, 10:] = 0
        batch["labels"] = batch["input_ids"].masked_fill(torch.arange(16) < 3, -100)
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("more", [dict(rho=1.0), dict(rho=2.0), dict(rho=2.0, whiten=True, adjust_scaling_factors=False)])
def test_eva_finds_peft_s_ranks_and_directions(more: dict[str, Any], tmp_path: Path) -> None:
    models, states = [], []
    for package in (peft, face):
        config = package.LoraConfig(r=4, lora_alpha=6, init_lora_weights="eva", eva_config=package.EvaConfig(**more),
                                    target_modules=TARGETS, task_type="CAUSAL_LM")  # fmt: skip
        made = package.get_peft_model(llama(), config).eval()
        states.append(package.get_eva_state_dict(made, batches(), show_progress_bar=False))
        package.initialize_lora_eva_weights(made, batches(), show_progress_bar=False)
        assert torch.equal(logits(made), logits(llama()))
        models.append(made)
    theirs, ours = states
    assert {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in ours.items()}
    for path in theirs:
        norms = [s[path].double().norm(dim=1) for s in states]
        if not ("whiten" in more and path.endswith(("q_proj", "k_proj"))):  # peft divides once for each layer that has the same inputs
            assert torch.allclose(norms[0], norms[1], rtol=1e-3)
        assert (torch.nn.functional.cosine_similarity(theirs[path].double(), ours[path].double()).abs() > 0.95).all(), path
    told = [(c.rank_pattern, c.alpha_pattern, sorted(c.target_modules)) for m in models for c in [m.peft_config["default"]]]
    assert told[0] == told[1]
    fill(models[1])
    models[1].save_pretrained(tmp_path)
    for package in (peft, face):
        assert torch.allclose(logits(package.PeftModel.from_pretrained(llama(), tmp_path)), logits(models[1]), atol=2e-6)


@pytest.mark.filterwarnings("ignore")
def test_eva_with_a_state_of_its_own() -> None:
    """A layer without a rank loses its adapter, one that the state does not name starts as ever, one without memory gets some."""

    def config() -> face.LoraConfig:
        return face.LoraConfig(r=3, init_lora_weights="eva", target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")

    plain = get_eva_state_dict(llama(), batches(), config(), show_progress_bar=False)
    assert len(plain) == 4 and "model.layers.0.self_attn.q_proj" in plain
    made = face.get_peft_model(llama(), config(), low_cpu_mem_usage=True).eval()
    layers = "base_model.model.model.layers"
    state = {f"{layers}.0.self_attn.q_proj": torch.empty(0, 32), f"{layers}.1.self_attn.q_proj": torch.eye(5, 32)}
    with pytest.warns(UserWarning, match="init_lora_weights=True"):
        face.initialize_lora_eva_weights(made, eva_state_dict=state)
    attention = [layer.self_attn for layer in made.base_model.model.model.layers]
    assert type(attention[0].q_proj) is torch.nn.Linear and attention[1].q_proj.r == {"default": 5}
    assert attention[1].q_proj.scaling["default"] == pytest.approx(8 / 3) and not any(p.is_meta for p in made.parameters())
    assert (
        torch.equal(attention[1].q_proj.lora_A["default"].weight, torch.eye(5, 32)) and attention[0].v_proj.lora_A["default"].weight.any()
    )
    assert torch.equal(logits(made), logits(llama()))
    for wrong, said in (
        (lambda: face.initialize_lora_eva_weights(made), "dataloader is required"),
        (lambda: get_eva_state_dict(made, []), "dataloader is empty"),
        (lambda: get_eva_state_dict(llama(), batches()), "peft_config is required"),
        (lambda: get_eva_state_dict(made, batches(), prepare_layer_inputs_fn={"no": lambda *a: a[0]}), "not found in the model"),
        (lambda: get_eva_state_dict(made, [{"input_ids": torch.tensor([[3]])}], show_progress_bar=False), "larger batches"),
    ):
        with pytest.raises(ValueError, match=said):
            wrong()


@pytest.mark.parametrize("lowrank", [False, True])
def test_components_of_all_rows_from_batches(lowrank: bool) -> None:
    torch.manual_seed(0)
    rows = torch.randn(200, 12) * torch.logspace(0.5, -2, 12) + torch.linspace(-1, 1, 12)
    found = IncrementalPCA(n_components=4, batch_size=50, lowrank=lowrank, lowrank_seed=1).fit(rows)
    _, S, Vh = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    assert torch.allclose((found.components_ * Vh[:4]).sum(1).abs(), torch.ones(4), atol=2e-3)
    assert torch.allclose(found.singular_values_, S[:4], rtol=1e-2) and torch.allclose(found.mean_, rows.mean(0), atol=1e-5)
    assert torch.allclose(found.var_.float(), rows.var(0, unbiased=False), rtol=1e-4)
    assert torch.allclose(found.explained_variance_ratio_, S[:4] ** 2 / (S**2).sum(), rtol=2e-2)
    assert found.transform(rows).shape == (200, 4)
    with pytest.raises(ValueError, match="batch number of samples"):
        IncrementalPCA(n_components=4).partial_fit(rows[:3])
