"""What the face does better than peft, and that weft's own functions work on what it made."""

from __future__ import annotations

import copy
import io
import pickle
import random
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer
from peft.tuners import tuners_utils
from peft.utils import merge_utils

import weft
import weft.compat.peft as face
from tests.compat.stories import IDS, fill, logits
from tests.compat.stories_alora import HOW, config, out
from tests.conftest import llama
from tests.contract.test_alora import rows
from tests.parity.families import FAMILIES
from weft.compat.peft.layers import framework
from weft.compat.peft.targets import _find_minimal_target_modules


def made(**more: object) -> face.PeftModel:
    config = face.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = face.get_peft_model(llama(**more), config).eval()
    fill(model)
    return model


def test_wefts_functions_look_through_the_fronts(tmp_path: Path) -> None:
    model = made()
    out = logits(model)
    assert weft.summary(model).trainable == model.get_nb_trainable_parameters()[0]
    weft.save(model, tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(weft.load(llama(), tmp_path / "a")(IDS).logits, out)
    with weft.using(model, None):
        assert not torch.allclose(logits(model), out)
    weft.merge(model, "default")
    assert torch.allclose(logits(model), out, atol=1e-5)
    weft.unmerge(model)
    assert torch.equal(logits(model), out)


@pytest.mark.parametrize("name", ["0", "layers", "q_proj", "self_attn", "default.weight"])
def test_a_name_of_any_kind_saves_whole(name: str, tmp_path: Path) -> None:
    model = made()
    config = face.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    if "." in name:
        with pytest.raises(KeyError, match="module name can"):
            model.add_adapter(name, config)
        assert list(model.peft_config) == ["default"]
        return
    model.add_adapter(name, config)
    for each in ("default", name):
        assert len(face.get_peft_model_state_dict(model, adapter_name=each)) == 8
    fill(model)
    model.set_adapter(name)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(face.PeftModel.from_pretrained(llama(), tmp_path / name, adapter_name=name)), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_adapter_and_no_merge_leave_a_trace(dtype: torch.dtype) -> None:
    model = made(dtype=dtype)
    model.base_model.set_requires_grad("default", False)
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    out = logits(model)
    with model.disable_adapter():
        logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama(dtype=dtype)))
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(logits(model), out)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0]) and p.requires_grad == before[name][1], name


def test_those_that_are_not_merged_go_on_working() -> None:
    model = made()
    model.add_adapter("b", face.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    fill(model)
    model.base_model.set_adapter(["default", "b"])
    out = logits(model)
    model.merge_adapter(adapter_names=["b"])
    assert torch.allclose(logits(model), out, atol=1e-5)
    with pytest.warns(UserWarning, match="You are now additionally merging default"):
        model.merge_adapter(adapter_names=["default"])
    assert torch.allclose(logits(model), out, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model), out)


def test_a_model_goes_through_a_pickle_and_a_copy_keeps_its_own() -> None:
    model, file = made(), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(logits(again), logits(model))
    again.base_model.model.model.layers[0].mlp.down_proj.lora_B["default"].weight.data.zero_()
    assert not torch.equal(logits(again), logits(model))


def test_another_adapter_is_no_walk_over_those_that_are_there() -> None:
    """What adding, choosing and freezing go through is as large with thirty adapters as with one, and each still trains alone."""
    model = made()
    walked = [m for _, m in framework(model)]
    for i in range(30):
        model.add_adapter(f"a{i}", face.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    assert [m for _, m in framework(model)] == walked
    model.set_adapter("a7")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".a7." in n for n in trained)


def test_a_failed_adapter_leaves_nothing_behind() -> None:
    model = made()
    names, out = list(model.state_dict()), logits(model)
    with pytest.raises(ValueError, match="not found in the base model"):
        model.add_adapter("b", face.LoraConfig(target_modules=["nothing"]))
    with pytest.raises(ValueError, match="weft does not compute"):
        model.add_adapter("b", face.LoraConfig(target_modules=["q_proj"], use_qalora=True))
    assert list(model.state_dict()) == names and list(model.peft_config) == ["default"] and torch.equal(logits(model), out)


def test_a_base_in_four_bits() -> None:
    def base() -> torch.nn.Module:
        return weft.load_base("embedded", base="nf4", device="cpu")

    model = face.get_peft_model(base(), face.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")).eval()
    fill(model, size=0.02)
    out = logits(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    delta = layer.get_delta_weight("default")
    model.merge_adapter()
    assert torch.equal(layer.get_delta_weight("default"), delta)
    model.unmerge_adapter()
    assert torch.equal(logits(model), out)
    plain = model.merge_and_unload()
    assert torch.nn.functional.cosine_similarity(logits(plain).float().flatten(), out.float().flatten(), 0) > 0.999
    assert type(plain.model.layers[0].self_attn.q_proj) is torch.nn.Linear


@pytest.mark.parametrize("packed", [False, True])
def test_fused_experts_by_rows_and_packed(packed: bool) -> None:
    """Where peft refuses rows: each row of a batch through its own adapter on fused experts, on a packed base too."""
    torch.manual_seed(0)
    family = FAMILIES["Mixtral"]
    base = family.make().eval()
    if packed:
        weft.quant.quantise_(base, "nf4", block=32)
    ids = family.inputs()["input_ids"]
    config = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "task_type": "CAUSAL_LM"}
    model = face.get_peft_model(base, face.LoraConfig(r=2, init_lora_weights="gaussian", **config)).eval()
    spread = model.base_model.model.model.layers[0].mlp.experts.lora_A["default"].weight.std().item()
    assert 0.4 < spread < 0.6  # 1 / rank, whatever the number of experts
    model.add_adapter("b", face.LoraConfig(r=3, **config))
    fill(model)
    alone = {}
    with torch.no_grad():
        for name in ("default", "b"):
            model.set_adapter(name)
            alone[name] = model(input_ids=ids).logits
        rows = model(input_ids=ids, adapter_names=["b", "default"]).logits
        assert torch.allclose(rows[0], alone["b"][0], atol=1e-5) and torch.allclose(rows[1], alone["default"][1], atol=1e-5)
        model.merge_adapter()
        assert torch.allclose(model(input_ids=ids).logits, alone["b"], atol=2e-2 if packed else 1e-5)
        model.unmerge_adapter()
        assert torch.equal(model(input_ids=ids).logits, alone["b"])


def test_an_activated_lora(tmp_path: Path) -> None:
    """Beams, and weft's own functions, on what peft only writes greedily."""
    ids, mask = rows()
    model = face.get_peft_model(llama(), config(face)).eval()
    fill(model)
    want = out(model)
    how = HOW | {"num_beams": 3}
    assert torch.equal(model.generate(**how), model.generate(**how, use_cache=False))
    weft.save(model, tmp_path)
    again = weft.load(llama(), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids, attention_mask=mask).logits * mask[..., None], want)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(out(twin), want)
        fill(twin, seed=2)
        assert not torch.equal(out(twin), want) and torch.equal(out(model), want)
    with weft.rows(model, ["default", None, "default", None]):
        mixed = out(model)
    with weft.using(model, None):
        base = out(model)
    assert torch.allclose(mixed[::2], want[::2], atol=1e-6) and torch.allclose(mixed[1::2], base[1::2], atol=1e-6)
    inside = face.inject_adapter_in_model(config(face), llama()).eval()
    fill(inside)
    assert torch.equal(out(inside), want)


def test_what_is_never_called_is_refused() -> None:
    with pytest.raises(ValueError, match="never calls it"):
        face.get_peft_model(torch.nn.TransformerEncoderLayer(8, 2, 16), face.LoraConfig(target_modules=["out_proj"]))


def test_lora_plus() -> None:
    optimiser = face.optimizers.create_loraplus_optimizer(made(), torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    assert [(len(g["params"]), g["lr"]) for g in optimiser.param_groups] == [(4, 1e-3), (0, 1e-6), (4, 16e-3), (0, 16e-3)]


def test_a_file_does_not_choose_what_is_imported(tmp_path: Path) -> None:
    config = face.LoraConfig(target_modules=["q_proj"], base_model_name_or_path="x")
    config.save_pretrained(tmp_path, auto_mapping_dict={"parent_library": "antigravity", "base_model_class": "X"})
    with pytest.raises(ValueError, match="not in the import allowlist"):
        face.AutoPeftModel.from_pretrained(tmp_path)
    assert "antigravity" not in sys.modules


def test_swapping_names_both_ways_and_what_cannot_be_swapped(tmp_path: Path) -> None:
    hotswap = sys.modules["weft.compat.peft.utils.hotswap"]
    model, other = made(), made()
    fill(other, 3)
    config, want = other.peft_config["default"], logits(other)
    for state in (face.get_peft_model_state_dict(other), {n: p for n, p in other.state_dict().items() if ".lora_" in n}):
        fill(model, 7)
        hotswap.hotswap_adapter_from_state_dict(model, state, "default", config)
        assert torch.equal(logits(model), want)
    model.merge_adapter()
    with pytest.raises(ValueError, match="currently merged"):
        hotswap.hotswap_adapter_from_state_dict(model, {}, "default", config)
    with pytest.raises(ValueError, match="Incompatible PEFT types"):
        hotswap.check_hotswap_configs_compatible(config, face.IA3Config())
    with pytest.raises(ValueError, match="Hotswapping only supports"):
        hotswap.check_hotswap_configs_compatible(face.IA3Config(), face.IA3Config())
    with pytest.raises(ValueError, match="for use_rslora, False != True"):
        hotswap.check_hotswap_configs_compatible(config, face.LoraConfig(use_rslora=True))
    with pytest.raises(ValueError, match="No adapter layers found"):
        hotswap.prepare_model_for_compiled_hotswap(llama())


def test_what_layers_show_besides_tensors() -> None:
    vera = face.get_peft_model(llama(), face.VeraConfig(r=6, target_modules=["q_proj", "up_proj"]))
    q, up = (vera.base_model.model.model.layers[0].get_submodule(n) for n in ("self_attn.q_proj", "mlp.up_proj"))
    assert vera.base_model.vera_A["default"] is q.vera_A["default"] is up.vera_A["default"]
    assert q.vera_B["default"].shape == (48, 6) and q.r == {"default": 6}
    oft = face.get_peft_model(llama(), face.OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj"]))
    layer = oft.base_model.model.model.layers[0].self_attn.q_proj
    assert (layer.r, layer.oft_block_size) == ({"default": 4}, {"default": 8})


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_lora_fa_s_optimiser(tmp_path: Path) -> None:
    """As in peft, which projects in bfloat16 where it can, so that the two drift apart a little; and it goes on from its state."""
    out = []
    for package, create in ((peft, create_lorafa_optimizer), (face, face.optimizers.create_lorafa_optimizer)):
        config = package.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        model = package.get_peft_model(llama(), config)
        fill(model)
        start = logits(model.eval())
        optimiser = create(model, r=4, lora_alpha=6, lr=0.01, weight_decay=0.1)
        for _ in range(4):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        assert [n for n, p in model.named_parameters() if p.requires_grad] == [n for n, _ in model.named_parameters() if "lora_B" in n]
        out.append(logits(model) - start)
    assert (out[0] - out[1]).norm() < 0.05 * out[0].norm()
    again = face.optimizers.create_lorafa_optimizer(model, r=4, lora_alpha=6, lr=0.5)
    again.load_state_dict(optimiser.state_dict())
    assert again.param_groups[0]["lr"] == 0.01 and len(again.state) == 4 and set(again.factors) == set(again.param_groups[0]["params"])
    with pytest.raises(ValueError, match="at least 0"):
        face.optimizers.LoraFAOptimizer(model.parameters(), lr=-1)


INTEGRATION = """
import warnings; warnings.simplefilter("ignore")
import weft.compat.peft; weft.compat.peft.install()
import sys, torch
from peft import LoraConfig
from importlib.metadata import version
from tests.conftest import llama
assert version("peft") == weft.compat.peft.__version__
ids = torch.arange(3, 9)[None]
model = llama()
model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), adapter_name="a")
model.save_pretrained(sys.argv[1])
other = llama()
other.load_adapter(sys.argv[1], adapter_name="b")
with torch.no_grad():
    out = model(ids).logits
    assert torch.equal(other(ids).logits, out) and other.active_adapters() == ["b"]
    model.disable_adapters()
    assert torch.equal(model(ids).logits, llama()(ids).logits)
    model.enable_adapters()
    assert torch.equal(model(ids).logits, out)
print("done")
"""


IMPORTS = """
import weft.compat.peft; weft.compat.peft.install()
from peft.helpers import DoraCaching, check_if_peft_model, disable_input_dtype_casting, rescale_adapter_scale
from peft.import_utils import is_bnb_available, is_transformers_ge_v5, is_xpu_available
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, get_peft_model
from peft.mixed_model import COMPATIBLE_TUNER_TYPES
from peft.optimizers import create_loraplus_optimizer
from peft.peft_model import PeftModel, get_layer_status, get_peft_model_state_dict
from peft.tuners import LoraConfig, XLoraConfig, lora
from peft.tuners.adalora import AdaLoraLayer, RankAllocator, SVDLinear
from peft.tuners.ia3.layer import IA3Layer, Linear as IA3Linear
from peft.tuners.loha import LoHaLayer, Conv2d as LoHaConv2d
from peft.tuners.lora.bnb import Linear4bit
from peft.tuners.lora.config import CordaConfig, EvaConfig
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Embedding, Linear, LoraLayer, ParamWrapper
from peft.tuners.miss.layer import MissLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _find_minimal_target_modules, check_target_module_exists
from peft.tuners.xlora.model import XLoraModel
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, infer_device, _get_submodules
from peft.utils.constants import DUMMY_MODEL_CONFIG, MIN_TARGET_MODULES_FOR_OPTIMIZATION
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft.utils.incremental_pca import IncrementalPCA
from peft.utils.integrations import gather_params_ctx, init_empty_weights, skip_init_on_device
from peft.utils.merge_utils import dare_linear, dare_ties, prune, task_arithmetic, ties
from peft.utils.other import ModulesToSaveWrapper, id_tensor_storage
import peft, torch
assert LoraConfig is peft.LoraConfig and PEFT_TYPE_TO_TUNER_MAPPING["LORA"] is peft.LoraModel and XLoraConfig is peft.XLoraConfig
model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), peft.IA3Config(target_modules=["0"], feedforward_modules=[]))
assert isinstance(model.base_model.model[0], IA3Linear) and not issubclass(IA3Linear, LoraLayer) and lora.LoraLayer is LoraLayer
with init_empty_weights():
    assert torch.nn.Linear(2, 2).weight.is_meta
print("done")
"""


def test_names_stand_where_they_stand_in_peft() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", IMPORTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "done" in done.stdout, done.stderr[-3000:]


def test_tensors_are_combined_as_in_peft() -> None:
    """The functions of `peft.utils.merge_utils`, with the same dice."""
    ours = sys.modules["weft.compat.peft.utils.merge_utils"]
    torch.manual_seed(0)
    tensors, weights = [torch.randn(5, 6) for _ in range(3)], torch.tensor([0.5, 0.3, -1.2])
    for name, more in (("task_arithmetic", ()), ("magnitude_prune", (0.4,)), ("ties", (0.4,)), ("ties", (0.4, "frequency")),
                       ("dare_linear", (0.4,)), ("dare_ties", (0.4, "frequency"))):  # fmt: skip
        made = []
        for package in (merge_utils, ours):
            torch.manual_seed(1)
            made.append(getattr(package, name)(tensors, weights, *more))
        assert torch.allclose(*made), name
    for density, method in ((-1, "random"), (0.5, "x")):
        with pytest.raises(ValueError, match=r"Density should|Unknown method"):
            ours.prune(tensors[0], density, method)


def test_many_targets_are_written_as_few_endings() -> None:
    """As peft does it, for random trees of names."""
    dice = random.Random(0)
    for _ in range(300):
        names = list({".".join(dice.choice("abc") for _ in range(dice.randint(1, 4))) for _ in range(dice.randint(2, 30))})
        dice.shuffle(names)
        wanted, others = names[: len(names) // 2 + 1], names[len(names) // 2 + 1 :]
        assert _find_minimal_target_modules(wanted, others) == tuners_utils._find_minimal_target_modules(wanted, others)
    config = face.LoraConfig(target_modules=[f"model.layers.{i}.self_attn.{p}_proj" for i in range(10) for p in "qv"])
    assert face.get_peft_model(llama(num_hidden_layers=10), config).peft_config["default"].target_modules == {"q_proj", "v_proj"}


def test_a_transformers_model_adapts_itself(tmp_path: Path) -> None:
    """`model.add_adapter` and `model.load_adapter` of transformers, with the face installed as peft."""
    done = subprocess.run([sys.executable, "-c", INTEGRATION, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "done" in done.stdout, done.stderr[-3000:]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_adapter_that_is_broken_off_leaves_its_name_free(monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    """By Ctrl-C too."""
    model, config = made(), face.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])

    def broken(*args: object, **kwargs: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(type(model.base_model), "inject_adapter", broken)
        with pytest.raises(error):
            model.add_adapter("other", config)
        with pytest.raises(error):
            model.add_weighted_adapter(["default"], [1.0], "other", combination_type="cat")
        assert list(model.peft_config) == ["default"]
    model.add_adapter("other", config)
    assert list(model.peft_config) == ["default", "other"]
