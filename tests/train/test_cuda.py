"""The same on a GPU: a run resumes exactly, and a wrong loss is found although the host does not look at every step."""

from __future__ import annotations

import os
import signal

import pytest
import tiny_run
import torch

import weft
from weft.train import Diverged, Interrupted

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def run(folder, on_event=None, **overrides):
    recipe = tiny_run.recipe(folder, train__device="cuda", data__packing=False, **overrides)
    return weft.fit(tiny_run.model(), recipe, tokenizer=tiny_run.tokenizer(), on_event=on_event)


def test_resume_is_exact(tmp_path):
    calm = run(tmp_path, output=str(tmp_path / "calm"), train__log_every=3)

    def at_nine(event):
        if event["event"] == "step" and event["step"] == 9:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(tmp_path, at_nine, train__log_every=3)
    again = run(tmp_path, train__log_every=3)
    names = [tmp_path / d / "adapter_model.safetensors" for d in ("calm", "out")]
    assert names[0].read_bytes() == names[1].read_bytes() and again.eval_loss == calm.eval_loss
    assert again.history[-1]["step"] == 20 and all(line.get("memory", 1) > 0 for line in again.history)


def test_divergence_is_found(tmp_path):
    with pytest.raises(Diverged, match="stopped at step"):
        run(tmp_path, train__lr=1e30, train__clip=0, train__steps=40, train__log_every=10, train__save_every=5)
    kept = sorted((tmp_path / "out" / "checkpoints").glob("step-*"))
    assert all(torch.isfinite(p).all() for c in kept for p in weft.load(tiny_run.model(), c).parameters())
