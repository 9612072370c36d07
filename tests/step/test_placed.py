"""While a step is prepared: files and copies of the model are the plain model, and what somebody does to the model counts."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model

import weft
from tests.conftest import jolt
from tests.step.test_loss import rows
from tests.step.test_stacked import model_of
from weft.data import pad
from weft.step import loss_sum, prepare
from weft.step.fp8 import narrowable
from weft.step.regions import repeated
from weft.step.stackable import stacks


def at_work(monkeypatch, base=None):
    """A model, what it was before, and its step with all that can be on it; the compiler is left out."""
    monkeypatch.setattr("torch.compile", lambda f, **how: f)
    monkeypatch.setattr("weft.step.fast.usable", lambda t: True)
    monkeypatch.setattr("weft.step.fast.narrowable", partial(narrowable, everywhere=True))
    model, parameters = model_of(base=base)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    attributes = [on(m) for m in model.modules()]
    batch, said = pad(rows([9, 4, 7])), []
    fast = prepare(model, batch, parameters, compile=True, say=said.append)
    assert not said and len(fast.inside.mlps) == 2 and len(fast.inside.stacks) == 4 and fast.inside.norm is not None
    assert len(fast.narrow) == (14 if base else 0) and len(fast.inside.lone) == (0 if base else 2)
    return model, before, attributes, fast, batch


def on(module):
    assert module._compiled_call_impl is None
    return sorted(vars(module).keys() - {"_compiled_call_impl"}), list(module._state_dict_hooks), type(module)


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def sent(model):
    """As to another process."""
    return pickle.loads(ForkingPickler.dumps(model))


@pytest.mark.parametrize("base", [None, "fp8"])
@pytest.mark.parametrize("way", [saved, sent, copy.deepcopy])
def test_a_file_or_a_copy_is_the_plain_model(monkeypatch, way, base):
    model, before, attributes, fast, batch = at_work(monkeypatch, base)
    loss = fast.loss(batch).item()
    again = way(model)
    assert fast.loss(batch).item() == pytest.approx(loss, rel=1e-6)
    fast.close()
    assert attributes == [on(m) for m in again.modules()] == [on(m) for m in model.modules()]
    for state in (model.state_dict(), again.state_dict()):
        assert state.keys() == before.keys() and all(torch.equal(t, before[name]) for name, t in state.items())
    own = dict(model.named_parameters())
    for name, p in again.named_parameters():
        assert p.is_contiguous() and p.untyped_storage().nbytes() == p.nbytes and p.requires_grad == own[name].requires_grad, name
        assert way is sent or p.data_ptr() != own[name].data_ptr(), name  # processes share what is on a CPU
    ids = torch.randint(3, 97, (2, 12))
    assert torch.equal(again(ids).logits, model(ids).logits)  # with gradients: a stand-in would work here
    assert len(stacks(again, {}, narrowable(again, everywhere=True).values())) == 4


@pytest.mark.parametrize("base", [None, "fp8"])
def test_safetensors_take_the_model(monkeypatch, tmp_path, base):
    model, before, _, fast, _ = at_work(monkeypatch, base)
    save_model(model, str(tmp_path / "model"))
    save_file(model.state_dict(), tmp_path / "state")
    torch.save(model.state_dict(), tmp_path / "pickled")
    for state in (load_file(tmp_path / "model"), load_file(tmp_path / "state"), torch.load(tmp_path / "pickled")):
        assert state.keys() == before.keys() and all(torch.equal(t, before[name]) for name, t in state.items())
    plain = sum(t.nbytes for t in before.values())
    assert (tmp_path / "pickled").stat().st_size < 1.05 * plain + 400 * len(before)  # each weight once
    state, whole, inside = model.state_dict(), model.state_dict(keep_vars=True), model.model.layers[0]
    copied = {name for name, p in model.named_parameters() if state[name].data_ptr() != p.data_ptr()}
    assert copied == {n for n in before if n.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))} if base is None else not copied
    assert whole["model.layers.0.self_attn.q_proj.weight"] is inside.self_attn.q_proj.weight
    if base is None:  # transformers writes no packed weights
        model.save_pretrained(tmp_path / "folder")
        own = dict(type(model).from_pretrained(tmp_path / "folder").named_parameters())
        assert own and all(torch.equal(p, before[name]) for name, p in own.items())
    weft.save(model, tmp_path / "adapter")
    fast.close()
    fresh = type(model)(model.config).requires_grad_(False)
    weft.load(fresh, tmp_path / "adapter")
    saved = {name: t for name, t in fresh.state_dict().items() if ".weft." in name}
    assert saved and all(torch.equal(t, before[name]) for name, t in saved.items())


@pytest.mark.parametrize("compiled", [False, True])
def test_a_16_bit_step_under_autocast_is_the_step_without(monkeypatch, compiled):
    monkeypatch.setattr("torch.compile", lambda f, **how: f)
    batch, found = pad(rows([9, 4, 7])), []
    for autocast in (False, True):
        model, parameters = model_of(dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            fast = prepare(model, batch, parameters, compile=compiled, say=pytest.fail)
            loss = fast.loss(batch)
        loss.backward()
        found.append(([loss, *(p.grad for p in parameters.values())], fast.describe(), fast.said))
        fast.close()
    assert found[0][1:] == found[1][1:]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=0)


def test_a_32_bit_step_under_autocast_is_refused():
    model, parameters = model_of()
    batch = pad(rows([9, 4, 7]))
    fast = prepare(model, batch, parameters, compile=False, say=pytest.fail)
    with torch.autocast("cpu", torch.bfloat16):
        for step in (partial(prepare, model, batch, parameters), partial(fast.loss, batch), partial(fast.losses, batch, [3])):
            with pytest.raises(weft.WeftError, match="load the base in bf16"):
                step()
    fast.close()


def test_what_comes_to_the_model_meanwhile(monkeypatch):
    """The step sees it, or says why it cannot."""
    model, _, _, fast, batch = at_work(monkeypatch)

    def agrees():
        return fast.loss(batch).item() == pytest.approx(loss_sum(model, batch).item(), rel=1e-5)

    first = model.model.layers[0].self_attn
    before = fast.loss(batch).item()
    first.q_proj.weight.requires_grad_()
    fast.loss(batch).backward()
    assert first.q_proj.weight.grad is not None and first.q_proj.weight.grad.any() and agrees()
    first.q_proj.weight.requires_grad_(False)
    weft.adapt(model, weft.LoRA(rank=2, targets=["embed_tokens", "lm_head"]), name="ends")
    jolt(model)
    weft.use(model, ["default", "ends"])
    assert agrees() and fast.loss(batch).item() != pytest.approx(before, rel=1e-3)
    fast.loss(batch).backward()
    assert all(p.grad is not None for p in weft.adapters.trainable(model, "ends").values())
    weft.remove(model, "ends")
    handle = model.lm_head.register_forward_hook(lambda m, args, out: 2 * out)
    assert agrees()
    handle.remove()
    model.lm_head = torch.nn.Linear(32, 97, bias=False).requires_grad_(False)
    assert agrees()
    with pytest.raises(weft.WeftError, match=r"close\(\) the prepared step"):
        weft.adapt(model, weft.PrefixTuning(), name="prefix")
    assert weft.adapters.names(model) == ["default"]
    model.load_state_dict({name: 1.5 * t for name, t in model.state_dict().items()})
    assert agrees() and all(stack.valid() for stack in fast.inside.stacks.values())
    model.load_state_dict({name: t / 2 for name, t in model.state_dict().items()}, assign=True)
    assert agrees()
    model.half()
    model.float()
    assert agrees()
    repeated(model)[1].gradient_checkpointing = True
    with pytest.raises(weft.WeftError, match="gradient checkpointing"):
        fast.loss(batch)
    fast.close()


def test_preparing_again_closes_what_was_prepared(monkeypatch):
    model, before, attributes, fast, batch = at_work(monkeypatch)
    loss = fast.loss(batch).item()
    again = prepare(model, batch, weft.adapters.trainable(model, "default"), compile=True, say=pytest.fail)
    assert again.describe() == fast.describe() and fast.loss(batch).item() == pytest.approx(loss, rel=1e-5)
    fast.close()  # nothing is left to close
    assert all(stack.valid() for stack in again.inside.stacks.values()) and repeated(model)[0]._compiled_call_impl is not None
    assert again.loss(batch).item() == pytest.approx(loss, rel=1e-6)
    again.close()
    assert attributes == [on(m) for m in model.modules()]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
