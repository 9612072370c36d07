"""`layers_to_transform` and `layers_pattern`, which every method that stands on layers has."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from torch import nn

import weft
from tests.conftest import gpt2, llama
from tests.contract.test_contract import IN_FRONT, METHODS_TRIED

LAYERED = [name for name, make in METHODS_TRIED.items() if not isinstance(make("llama"), IN_FRONT)]


def _paths(model: nn.Module) -> set[str]:
    return set(weft.adapters.attached(model, "default")) - {""}  # what stands on the model itself is no target


@pytest.mark.parametrize("method", LAYERED)
def test_only_the_targets_inside_the_layers_are_adapted(method: str) -> None:
    for make, family in ((llama, "llama"), (gpt2, "gpt2")):
        whole = METHODS_TRIED[method](family)
        everywhere = _paths(weft.adapt(make(), whole))
        if not any(re.search(r"\.1\.", p) for p in everywhere):
            continue  # stands on an embedding alone
        beside = {"bias": "none"} if getattr(whole, "bias", "none") == "all" else {}  # biases and whole modules are no targets
        beside |= {"train_norms": False} if hasattr(whole, "train_norms") else {}
        beside |= {"trainable_token_indices": ()} if hasattr(whole, "trainable_token_indices") else {}
        some: Any = replace(whole, layers_to_transform=1, modules_to_save=(), **beside)
        assert some.layers_to_transform == (1,) and weft.Method.from_dict(some.to_dict()) == some
        found = _paths(weft.adapt(make(), some))
        named: Any = replace(some, layers_to_transform=[1], layers_pattern="layers" if family == "llama" else ["h"])
        assert found == _paths(weft.adapt(make(), named))
        everywhere = _paths(weft.adapt(make(), replace(some, layers_to_transform=None)))
        assert found == {p for p in everywhere if re.search(r"\.1\.", p)} and found < everywhere


class Mixed(nn.Module):
    """Layers with numbered experts inside, and a head outside."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(4, 4) for _ in range(3))}) for _ in range(2))
        self.head = nn.Linear(4, 4)


def test_of_several_numbers_the_first_is_the_layer_s_and_a_whole_path_counts_wherever_it_is() -> None:
    experts = {f"layers.1.experts.{i}" for i in range(3)}
    assert _paths(weft.adapt(Mixed(), weft.LoRA(rank=2, layers_to_transform=1))) == experts
    by_name = weft.LoRA(rank=2, layers_to_transform=2, layers_pattern=["nothing", "experts"])
    assert _paths(weft.adapt(Mixed(), by_name)) == {"layers.0.experts.2", "layers.1.experts.2"}
    with_head = weft.LoHa(rank=2, layers_to_transform=1, targets=("head", "*.experts.0"))
    assert _paths(weft.adapt(Mixed(), with_head)) == {"layers.1.experts.0", "head"}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: weft.IA3(layers_to_transform=[1, 7, 9]), ["layers_to_transform=7", "layers_to_transform=9", "none of the targets"]),
        (lambda: weft.LoHa(layers_to_transform=[1], layers_pattern="h"), ["layers_to_transform=1", "layers_pattern='h'"]),
        (lambda: weft.VeRA(layers_to_transform=[]), ["layers_to_transform=()", "leave it out"]),
        (lambda: weft.OFT(layers_to_transform=[-1]), ["layers_to_transform=(-1,)", "from 0"]),
        (lambda: weft.LoKr(layers_pattern="layers"), ["layers_to_transform=None", "and layers_pattern with it"]),
        (lambda: weft.LoRA(layers_to_transform=[0], layers_pattern="*layers"), ["layers_pattern='*layers'", "'layers' say"]),
        (lambda: weft.LoRA(targets=(), target_parameters="q_proj.weight", layers_to_transform=[0]), ["chooses among the targets"]),
        (lambda: weft.PromptTuning(layers_to_transform=[0]), ["PromptTuning stands on the model"]),
        (lambda: weft.PrefixTuning(layers_to_transform=[0]), ["PrefixTuning stands on the model"]),
        (lambda: weft.PTuning(layers_to_transform=[0]), ["PTuning stands on the model"]),
    ],
)
def test_layers_that_there_are_not_are_an_error(make: Any, words: list[str]) -> None:
    with pytest.raises(weft.WeftError) as error:
        weft.adapt(llama(), make())
    assert all(w in str(error.value) for w in words), str(error.value)
