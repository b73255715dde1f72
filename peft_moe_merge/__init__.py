"""Mixture-of-LoRA experts that merge and freeze while a CLIP model learns one domain after another.

Importing this package registers its methods with PEFT.
"""

__version__ = "0.1.0"
