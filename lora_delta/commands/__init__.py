"""The subcommands of ``lora-delta``, one module each: ``add`` registers the parser."""
