"""The subcommands of ``lora-delta``, one module each: ``add`` registers the parser."""

import torch

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
