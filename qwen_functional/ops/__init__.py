"""One file per operation: its formula as plain torch, and its vjp, side by side."""
