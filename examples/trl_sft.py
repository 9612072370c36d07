"""TRL's SFTTrainer with a weft model: `install()` lets every `import peft`, TRL's own among them, mean weft's face of it.

Needs trl (pip install trl). Runs on the base that is in the package, on a CPU, in half a minute.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import weft.compat.peft

weft.compat.peft.install()  # before trl and transformers look for peft

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

import weft  # noqa: E402


def main(folder: Path) -> None:
    model, tokenizer = weft.load_base("embedded", device="cpu"), weft.load_tokenizer("embedded")
    rows = [{"prompt": f"{a} + {b} = ", "completion": f"{a + b}"} for a in range(8) for b in range(8)]
    trainer = SFTTrainer(
        model=model,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        args=SFTConfig(
            output_dir=str(folder), max_steps=20, per_device_train_batch_size=8, learning_rate=2e-3, report_to=[], use_cpu=True,
            logging_steps=10, save_strategy="no", bf16=False, disable_tqdm=True, gradient_checkpointing=False,
        ),
    )  # fmt: skip
    assert isinstance(trainer.model, PeftModel)
    trainer.model.print_trainable_parameters()
    trainer.train()
    trainer.save_model(str(folder))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; adapter in {sorted(p.name for p in folder.glob('adapter*'))}")
    again = PeftModel.from_pretrained(weft.load_base("embedded", device="cpu"), folder)
    ids = torch.tensor([tokenizer("3 + 4 = ")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)


if __name__ == "__main__":
    assert AutoPeftModelForCausalLM is weft.compat.peft.AutoPeftModelForCausalLM
    with tempfile.TemporaryDirectory() as made:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(made))
