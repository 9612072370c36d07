"""One PEFT method a file: the paper, the equation, the hyper-parameters, the module."""

from weft.methods.full import Full
from weft.methods.lora import LoRA

__all__ = ["Full", "LoRA"]
