"""DoRA beside peft's: dropout, several adapters, and what is kept between calls."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import torch
from torch import nn

import weft
from tests.conftest import Plain, jolt, llama


def test_dropout_means_what_it_means_in_peft(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4, bias=False))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["0", "1"], use_dora=True, lora_dropout=0.5))
    jolt(theirs, 0.5)
    theirs.save_pretrained(tmp_path)
    ours, x = weft.load(copy.deepcopy(base), tmp_path).train(), torch.randn(3, 6)
    torch.manual_seed(1)
    want = theirs.train()(x)
    torch.manual_seed(1)
    assert torch.allclose(ours(x), want, atol=1e-6)


def test_adapters_add_up_in_any_order_and_survive_merging_a_part() -> None:
    base, ids = Plain().eval(), torch.randint(0, 40, (2, 5))
    x0 = copy.deepcopy(base)(ids)
    changes = {}
    for seed, (name, kind) in enumerate((("a", weft.DoRA), ("b", weft.LoRA), ("c", weft.DoRA))):
        weft.adapt(base, kind(rank=2, targets=["down"], bias="lora_only"), name=name)
        jolt(nn.ModuleList(weft.adapters.attached(base, name).values()), seed=seed)
        changes[name] = base(ids) - x0
    want = x0 + sum(changes.values())
    for order in (["a", "b", "c"], ["c", "b", "a"], ["b", "a", "c"]):
        weft.use(base, order)
        assert torch.allclose(base(ids), want, atol=1e-5)
    for part in (["b"], ["a"], ["c", "a"]):
        weft.merge(base, part)
        assert torch.allclose(base(ids), want, atol=1e-5), part
        weft.unmerge(base)
    assert torch.allclose(weft.merge(base, keep=False)(ids), want, atol=1e-5)


def test_what_is_kept_in_evaluation_follows_every_write() -> None:
    model, ids = weft.adapt(llama(), weft.DoRA(rank=2)), torch.randint(3, 40, (2, 5))
    jolt(model)

    def fresh() -> torch.Tensor:
        return copy.deepcopy(model)(ids).logits  # a copy keeps nothing

    with torch.no_grad():
        for change in (lambda p: p.add_(0.1), lambda p: setattr(p, "data", p * 1.1)):
            model(ids)
            for p in weft.adapters.trainable(model, "default").values():
                change(p)
            assert torch.equal(model(ids).logits, fresh())
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        assert torch.equal(model(ids).logits, fresh())


def test_the_sum_of_weight_and_update_is_never_made() -> None:
    """The largest tensor made on the way is far smaller than the weight."""
    layer = nn.Linear(512, 512)
    model = weft.adapt(nn.Sequential(layer), weft.DoRA(rank=2))
    x, sizes = torch.randn(3, 512), []
    model(x)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made = [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, torch.Tensor)]
            sizes.extend(t.numel() for t in made if t.untyped_storage().data_ptr() != layer.weight.untyped_storage().data_ptr())
            return out

    with Watch():
        model(x).sum().backward()
    assert 0 < max(sizes) < 4 * 512
