"""Every method that peft has, on every family of models: what one package saves the other loads, with the same logits and gradients.

`python -m tests.parity.test_families` writes docs/parity.md; the test asks that it tells what is so.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import weft
from tests.conftest import jolt
from tests.parity.families import FAMILIES, Family

TABLE = Path(__file__).parent.parent.parent / "docs" / "parity.md"
CLOSE, CLOSE_GRADIENT = 1e-6, 1e-5  # ‖ours − theirs‖ / ‖theirs‖ in fp32
YES = "✓"


def _linear(kind: Callable[..., Any], **options: Any) -> Callable[[Family], Any]:
    return lambda f: kind(task_type=f.task, target_modules=f.linear, **options)


def _dense(kind: Callable[..., Any], **options: Any) -> Callable[[Family], Any]:
    return lambda f: kind(task_type=f.task, target_modules=f.dense or f.linear, **options)


def _ia3(f: Family) -> Any:
    named = {} if f.ia3 is None else dict(target_modules=f.ia3[0], feedforward_modules=f.ia3[1])
    return peft.IA3Config(task_type=f.task, **named)


def _prompt(kind: Callable[..., Any], **options: Any) -> Callable[[Family], Any]:
    return lambda f: kind(task_type=f.task, num_virtual_tokens=3, **options) if f.task else None


def _activated(f: Family) -> Any:
    """Invoked in the middle of the first row, and nowhere in the second."""
    call = f.inputs()["input_ids"][0, 3:5].tolist()
    return peft.LoraConfig(task_type=f.task, target_modules=f.dense or f.linear, r=4, alora_invocation_tokens=call)


def _tokens(f: Family) -> Any:
    if f.words is None:
        return None
    return peft.TrainableTokensConfig(task_type=f.task, token_indices=TOKENS, target_modules=[f.words] if f.words else None)


def _lora_and_tokens(f: Family) -> Any:
    if f.words is None:
        return None
    given = {f.words: TOKENS} if f.words else TOKENS
    return peft.LoraConfig(task_type=f.task, target_modules=f.dense or f.linear, r=4, trainable_token_indices=given)


TOKENS = [26, 11, 12, 32]  # in the batches of all families, between them, and not in order
METHODS: dict[str, Callable[[Family], Any]] = {
    "LoRA": _linear(peft.LoraConfig, r=4),
    "rsLoRA": _linear(peft.LoraConfig, r=4, use_rslora=True),
    "DoRA": _linear(peft.LoraConfig, r=4, use_dora=True),
    "activated LoRA": lambda f: _activated(f) if f.task == "CAUSAL_LM" else None,
    "AdaLoRA": _dense(peft.AdaLoraConfig, init_r=4, target_r=2, total_step=10),
    "VeRA": _dense(peft.VeraConfig, r=8),
    "IA3": _ia3,
    "LoHa": _dense(peft.LoHaConfig, r=4),
    "LoKr": _dense(peft.LoKrConfig, r=4),
    "OFT": _dense(peft.OFTConfig, oft_block_size=4),
    "LN tuning": lambda f: peft.LNTuningConfig(task_type=f.task, target_modules=list(f.norms)) if f.norms else None,
    "trained tokens": _tokens,
    "LoRA with tokens": _lora_and_tokens,
    "prompt tuning": _prompt(peft.PromptTuningConfig),
    "prefix tuning": _prompt(peft.PrefixTuningConfig),
    "P-tuning": _prompt(peft.PromptEncoderConfig, encoder_hidden_size=8),
}
_bases: dict[str, nn.Module] = {}


def base_of(family: str) -> nn.Module:
    if family not in _bases:
        torch.manual_seed(0)
        _bases[family] = FAMILIES[family].make().eval()
    return copy.deepcopy(_bases[family])


def out(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The first floating-point thing that a model returns: logits, hidden states, similarities."""
    y: Any = model(**inputs)
    if isinstance(y, Tensor):
        return y
    return y.logits if hasattr(y, "logits") else y.logits_per_image


def far(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖; peft hands out the virtual tokens' logits too, in front."""
    if ours.dim() == 3 and theirs.dim() == 3 and ours.shape != theirs.shape:
        theirs = theirs[:, -ours.shape[1] :]
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))


def measure(family: str, method: str) -> str:
    """What holds for this pair: `✓`, `–` where the method has no meaning, or in a few words what does not hold."""
    f = FAMILIES[family]
    base, inputs = base_of(family), f.inputs()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own, about models of this size and this version of transformers
        place = Path(folder)
        try:
            config = METHODS[method](f)
            if config is None:
                return "–"
            torch.manual_seed(1)
            theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
            jolt(theirs, 0.05)
            want = out(theirs, inputs)
            theirs.save_pretrained(place / "theirs")
        except Exception as e:  # noqa: BLE001 (whatever it is that peft cannot do here is the cell's text)
            return f"peft: {type(e).__name__}"
        try:
            ours = weft.load(copy.deepcopy(base), place / "theirs", name="mine")
        except weft.WeftError as e:
            why = str(e).removeprefix(f"{place / 'theirs'}: ").splitlines()[0]
            return "weft: not yet" if why.startswith("weft does not have the method") else f"weft: {why}"
        got = out(ours, inputs)
        if not far(got, want) <= CLOSE:
            return f"logits {far(got, want):.0e}"
        if torch.equal(want.detach()[..., -1:], out(base, inputs)[..., -1:]):
            return "peft: changes nothing"
        weft.save(ours, place / "ours", name="mine")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), place / "ours").eval()
        if not far(got, out(again, inputs)) <= CLOSE:
            return f"logits back {far(got, out(again, inputs)):.0e}"
        return YES if (worst := gradients(ours, theirs, base, inputs, place)) <= CLOSE_GRADIENT else f"gradients {worst:.0e}"


def gradients(ours: nn.Module, theirs: Any, base: nn.Module, inputs: dict[str, Tensor], place: Path) -> float:
    """How far the adapter's gradients are apart, tensor by tensor, the worst. peft's are saved as if they were weights, to match names."""
    width = out(base, inputs).shape[1]
    prompts: list[Tensor] = []  # of P-tuning the file holds what a network made, so that is what has the gradient
    for network in (m for m in theirs.modules() if isinstance(m, peft.PromptEncoder)):
        network.register_forward_hook(lambda module, given, made: made.retain_grad() or prompts.append(made))
    for model in (ours, theirs):
        y = out(model, inputs)
        (y[:, -width:] if y.dim() == 3 else y).square().mean().backward()
    for p in (p for p in theirs.parameters() if p.requires_grad):
        p.data = torch.zeros_like(p) if p.grad is None else p.grad
    theirs.save_pretrained(place / "gradients")
    wanted = weft.adapters.trainable(weft.load(copy.deepcopy(base), place / "gradients"), "default")
    if prompts:
        wanted[".P"] = prompts[0].grad[0]
    whole = torch.cat([g.detach().flatten() for g in wanted.values()]).norm()
    worst = 0.0
    for key, p in weft.adapters.trainable(ours, "mine").items():
        mine = torch.zeros_like(p) if p.grad is None else p.grad
        # a tensor whose gradient is nothing but rounding has no relative error: the floor is a thousandth of the whole gradient
        worst = max(worst, float((mine - wanted[key]).norm() / wanted[key].norm().clamp_min(1e-3 * whole)))
    return worst


def table() -> str:
    """docs/parity.md."""
    rows = [
        "# Interchange with peft, family by family",
        "",
        f"Each ✓: what peft {peft.__version__} saves weft loads, and the reverse; logits agree within {CLOSE:.0e} and each gradient of the "
        f"adapter within {CLOSE_GRADIENT:.0e}, relative, in fp32, on a small random model of the family. `–`: the method has no meaning "
        "there. `peft: ...`: peft itself refuses or fails. Made by `python -m tests.parity.test_families`, and held by the tests.",
        "",
        "| | " + " | ".join(METHODS) + " |",
        "|:---|" + ":---:|" * len(METHODS),
    ]
    for family in FAMILIES:
        rows.append(f"| {family} | " + " | ".join(measure(family, method) for method in METHODS) + " |")
    return "\n".join(rows) + "\n"


def committed() -> dict[tuple[str, str], str]:
    cells = [
        [c.strip() for c in line.strip("|\n").split("|")] for line in TABLE.read_text(encoding="utf-8").splitlines() if line[:1] == "|"
    ]
    return {(row[0], method): cell for row in cells[2:] for method, cell in zip(cells[0][1:], row[1:], strict=True)}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_of_parity_tells_what_is_so(family: str) -> None:
    told = committed()
    found = {method: measure(family, method) for method in METHODS}
    assert found == {method: told[family, method] for method in METHODS}, "python -m tests.parity.test_families makes it anew"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    TABLE.write_text(table(), encoding="utf-8")
