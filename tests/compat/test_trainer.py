"""transformers' Trainer with a model of this face: installed as `peft` (adapters as checkpoints), and by the changed import line alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = '''
import sys, warnings
from pathlib import Path
import weft.compat.peft
if "{how}" == "installed":
    weft.compat.peft.install()
    import peft
    assert peft is weft.compat.peft
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.tuners.lora import LoraLayer, Linear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper
    import peft.utils.constants, peft.tuners.lora.layer
else:
    from weft.compat.peft import LoraConfig, PeftModel, get_peft_model
    from weft.compat.peft.tuners.lora import LoraLayer, Linear
import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import set_seed
from tests.conftest import llama

folder = Path(sys.argv[1])
rows = [dict(input_ids=(t := torch.randint(3, 40, (8,), generator=torch.Generator().manual_seed(i))), labels=t) for i in range(16)]

def run(where, steps, resume=None):
    set_seed(0)
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type="CAUSAL_LM"))
    assert isinstance(model.base_model.model.model.layers[0].self_attn.q_proj, LoraLayer)
    args = TrainingArguments(output_dir=where, per_device_train_batch_size=2, max_steps=steps, save_steps=3, learning_rate=1e-2,
                             report_to=[], use_cpu=True, logging_strategy="no", disable_tqdm=True, lr_scheduler_type="constant")
    trainer = Trainer(model=model, args=args, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, model

trainer, straight = run(folder / "straight", 6)
run(folder / "broken", 3)
_, resumed = run(folder / "broken", 6, resume=str(folder / "broken" / "checkpoint-3"))
moved = 0
for (name, a), (_, b) in zip(straight.named_parameters(), resumed.named_parameters()):
    assert torch.equal(a, b), name
    moved += bool("lora_B" in name and a.abs().sum() > 0)
assert moved == 4
files = {{p.name for p in (folder / "straight" / "checkpoint-6").iterdir()}}
adapters = {{"adapter_model.safetensors", "adapter_config.json"}} <= files
assert adapters == ("{how}" == "installed"), files
if not adapters:
    straight.save_pretrained(folder / "straight" / "checkpoint-6")
again = PeftModel.from_pretrained(llama(), folder / "straight" / "checkpoint-6")
ids = rows[0]["input_ids"][None]
with torch.no_grad():
    assert torch.equal(again(input_ids=ids).logits, straight.eval()(input_ids=ids).logits)
print("trained")
'''


@pytest.mark.parametrize("how", ["installed", "imported"])
def test_the_trainer_trains_saves_resumes_and_reloads(how: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(how=how), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "trained" in done.stdout, done.stderr[-3000:]
