"""A LoRA on a 4-bit base sharded over several processes (FSDP2): each holds its share of the packed rows, and trains on its own batches.

    torchrun --nproc-per-node 2 examples/sharded.py [steps] [folder]

On CPUs by gloo, or on as many CUDA cards by NCCL. Needs torch 2.13 (2.11's FSDP2 refuses parameters of whole numbers). The base is the
small one in the package and the task one of the demo's, so nothing is downloaded.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import weft
from weft.adapters import trainable
from weft.data import Batches, DataConfig, demo, load_rows, prepare
from weft.step import loss_sum


def main(steps: int, folder: Path) -> None:
    if torch.__version__ < "2.12":  # "only Tensors of floating point dtype can require gradients"
        raise SystemExit(f"torch {torch.__version__} cannot shard a packed base; torch 2.13 can")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()

    model, tokenizer = weft.load_base("embedded", base="nf4", device=device), weft.load_tokenizer("embedded")
    torch.manual_seed(0)  # the adapter must start the same in every process
    weft.adapt(model, weft.LoRA(rank=8, alpha=16))
    whole = sum(p.nbytes for p in model.parameters())

    mesh = init_device_mesh(device, (processes,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    here = sum(p.to_local().nbytes for p in model.parameters())
    optimiser = torch.optim.AdamW(trainable(model, "default").values(), lr=4e-3, weight_decay=0.0)

    with tempfile.TemporaryDirectory() as rows:
        train, _ = demo.write("dates", rows)
        examples = prepare(load_rows(train), tokenizer, DataConfig(train=str(train)), progress=False).examples
    batches = Batches(examples, tokens=1024, packing=False, seed=0)
    per_epoch = len(batches) // processes
    model.train()
    for step in range(steps):
        batch = batches.epoch(step // per_epoch)[step % per_epoch * processes + rank].to(device)
        targets = torch.tensor(batch.n_targets, device=device)
        dist.all_reduce(targets)
        loss = loss_sum(model, batch) * processes / targets  # FSDP2 takes the mean of the processes' gradients
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        dist.all_reduce(loss := loss.detach())
        if rank == 0 and (step % 10 == 0 or step == steps - 1):
            print(f"step {step}: loss {loss / processes:.3f}", flush=True)

    weft.save(model, folder)  # gathered by all, written by the first
    dist.barrier()
    if rank == 0:
        print(f"{here / 1e6:.1f} of {whole / 1e6:.1f} MB of parameters on each of {processes} processes; the adapter is in {folder}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40, Path(sys.argv[2] if len(sys.argv) > 2 else "adapter"))
