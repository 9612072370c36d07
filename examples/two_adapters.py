"""Train two adapters on one frozen base, then answer one batch in which every row goes through its own.

    python examples/two_adapters.py [steps]

Uses the small base that is in the package and the demo's generated tasks, so nothing is downloaded.
The 120 steps are those of the demo; with 20 the adapters only begin to learn.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

import weft
from weft.data import DataConfig, demo
from weft.train import EvalConfig, Recipe, TrainConfig
from weft.train.evaluate import end_of_turn, left_padded, prompt_ids


def main(steps: int = 120) -> None:
    model, tokenizer = weft.load_base("embedded"), weft.load_tokenizer("embedded")
    with tempfile.TemporaryDirectory() as folder:
        for task in ("dates", "records"):
            train, held_out = demo.write(task, folder)
            recipe = Recipe(
                name=task,
                method=weft.LoRA(rank=8, alpha=16),
                data=DataConfig(train=str(train), eval=str(held_out)),
                train=TrainConfig(lr=4e-3, steps=steps, tokens=1024, progress="lines"),
                eval=EvalConfig(start=False, rows=50, train_rows=0),
                output=str(Path(folder) / task),
            )
            weft.fit(model, recipe, tokenizer=tokenizer)

    questions = [
        ("dates", "ISO date: The lease ends on the third of May, 2031."),
        ("records", "JSON record: Maya Costa from Lisbon orders four lamps, express."),
        (None, "ISO date: The lease ends on the third of May, 2031."),  # the bare base
    ]
    stop = end_of_turn(tokenizer, model)
    ids, mask = left_padded([prompt_ids(tokenizer, [{"role": "user", "content": q}]) for _, q in questions], tokenizer.pad_token_id)
    with torch.no_grad(), weft.rows(model, [owner for owner, _ in questions]):
        made = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=48, do_sample=False, eos_token_id=stop, pad_token_id=stop[0]
        )
    for (owner, question), row in zip(questions, made[:, ids.shape[1] :].tolist(), strict=True):
        end = next((i for i, token in enumerate(row) if token in stop), len(row))
        print(f"{owner or 'bare base':10} {question}\n{'':10} -> {tokenizer.decode(row[:end])}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
