"""One PEFT method a file: the paper, the equation, the hyper-parameters, the module."""

from weft.methods.bitfit import BitFit
from weft.methods.dora import DoRA
from weft.methods.full import Full
from weft.methods.ia3 import IA3
from weft.methods.ln_tuning import LNTuning
from weft.methods.lora import LoRA
from weft.methods.prefix import PrefixTuning
from weft.methods.prompt import PromptTuning
from weft.methods.ptuning import PTuning
from weft.methods.vera import VeRA

__all__ = ["IA3", "BitFit", "DoRA", "Full", "LNTuning", "LoRA", "PTuning", "PrefixTuning", "PromptTuning", "VeRA"]
