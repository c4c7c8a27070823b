"""Reading and writing folders of PEFT adapters, and comparing gradients with PEFT's own."""
