"""Run by test_sharded.py in two processes: FSDP2 and DDP on a base in several formats, beside one process with the whole batch."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import weft
from tests.conftest import jolt, llama
from tests.models.test_stream import mixtral
from weft.adapters import trainable
from weft.quant import quantise_

STEPS = 2
LR = 0.01
LORA = weft.LoRA(rank=4, alpha=8)
CASES: list[tuple[str, str, weft.Method]] = [
    *(("fsdp", base, LORA) for base in ("nf4", "fp4", "int8", "fp8", "bf16", "experts in nf4", "experts in fp8")),
    *(("fsdp", "nf4", method) for method in (weft.DoRA(rank=4), weft.IA3(), weft.PromptTuning(tokens=3))),
    *(("fsdp bf16", base, LORA) for base in ("nf4", "int8", "fp8")),
    *(("ddp", base, LORA) for base in ("nf4", "int8", "fp8", "bf16")),
]


def bare(base: str) -> nn.Module:
    """33 columns are odd: such a weight is packed flat, and its rows are no rows any longer."""
    if base.startswith("experts"):
        return mixtral()
    return llama(dtype=torch.bfloat16 if base == "bf16" else torch.float32, intermediate_size=33)


def made(base: str, method: weft.Method) -> nn.Module:
    model, base = bare(base), base.rpartition(" ")[2]
    if base != "bf16":
        quantise_(model, base, **({"nested": False} if base == "fp4" else {}))
    weft.adapt(model, method)
    jolt(model, 0.05)
    return model


def batch() -> Tensor:
    return torch.randint(3, 90, (4, 7), generator=torch.Generator().manual_seed(5))


def steps(model: nn.Module, call: Callable[..., Any], ids: Tensor, average: Callable[[Tensor], Tensor]) -> tuple[list[float], dict, dict]:
    """(the losses, the gradients of the first step, the adapter afterwards); `average` is over the processes."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(trained.values(), lr=LR)
    losses, gradients = [], {}
    for step in range(STEPS):
        loss = call(input_ids=ids, labels=ids, use_cache=False).loss.float()
        loss.backward()
        losses.append(average(loss.detach()).item())
        if step == 0:
            gradients = {n: whole(p.grad).clone() for n, p in trained.items()}
        optimiser.step()
        optimiser.zero_grad()
    return losses, gradients, {n: whole(p).detach().clone() for n, p in trained.items()}


def whole(t: Any) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def mean(t: Tensor) -> Tensor:
    dist.all_reduce(t)
    return t / dist.get_world_size()


def near(mine: Tensor, its: Tensor, tolerance: float) -> bool:
    return bool((mine.float() - its.float()).norm() <= tolerance * its.float().norm() + 1e-7)


def check(base: str, method: weft.Method, how: str, mesh: DeviceMesh, folder: Path) -> None:
    model = made(base, method)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    alone = copy.deepcopy(model)
    want = steps(alone, alone, batch(), lambda t: t)
    mine = batch().chunk(dist.get_world_size())[dist.get_rank()]
    call: Any = model
    if how == "ddp":
        call = DistributedDataParallel(model)
    else:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if how == "fsdp bf16" else None)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        for name, p in model.named_parameters():
            assert cast(Any, p).to_local().shape[0] <= -(-p.shape[0] // 2), f"a process holds all of {name}"
    got = steps(model, call, mine, mean)
    tolerance = 0.05 if "bf16" in (base, how.removeprefix("fsdp ")) else 1e-4
    assert all(abs(a - b) < tolerance * b for a, b in zip(got[0], want[0], strict=True)), (got[0], want[0])
    for found, its in zip(got[1:], want[1:], strict=True):
        assert found.keys() == its.keys() and found
        for name, value in its.items():
            assert near(found[name], value, 10 * tolerance), (base, how, name, found[name], value)
    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    gathered = {k.removeprefix("module."): v for k, v in gathered.items()}
    if dist.get_rank() == 0:
        assert gathered.keys() == state.keys()
        for name, value in gathered.items():
            if name in want[2]:
                assert torch.equal(value, got[2][name]), name
            else:
                assert value.dtype == state[name].dtype and torch.equal(value, state[name]), name
    if how != "ddp":
        check_files(model, want[2], base, method, folder)
    if dist.get_rank() == 0:
        print(how, base, type(method).__name__, "equal", flush=True)


def check_files(model: nn.Module, want: dict[str, Tensor], base: str, method: weft.Method, folder: Path) -> None:
    """What is saved loads in one process; what a sharded model cannot do is refused."""
    place = folder / f"{base}-{type(method).__name__}-{len(list(folder.iterdir()))}"
    dist.barrier()
    weft.save(model, place)
    dist.barrier()
    if dist.get_rank() == 0:
        assert sorted(p.name for p in place.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    loaded = trainable(weft.load(bare(base), place), "default")
    mine = trainable(model, "default")
    assert loaded.keys() == mine.keys() and loaded
    assert all(torch.equal(whole(p), loaded[n]) for n, p in mine.items())
    for refused, says in ((lambda: weft.merge(model), "not merged"), (lambda: weft.adapt(model, method, name="more"), "sharded already")):
        try:
            refused()
        except weft.WeftError as e:
            assert says in str(e)
        else:
            raise AssertionError(says)


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    for how, base, method in CASES:
        check(base, method, how, mesh, folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
