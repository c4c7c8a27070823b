"""``python -m lora_delta`` is ``lora-delta``."""

import sys

from .cli import main

sys.exit(main())
