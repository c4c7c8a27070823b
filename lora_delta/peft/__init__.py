"""Folders of PEFT adapters, in and out, and the comparison of gradients with PEFT's own."""
