"""From a hub id or a folder to the local folder of a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub

# The only files that are fetched from the hub: data, never code or pickles. Newer checkpoints keep the chat
# template in a separate file instead of tokenizer_config.json.
FETCHED = ("*.json", "*.safetensors", "chat_template.jinja")


def resolve_checkpoint(
    model: str | Path,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    patterns: Sequence[str] = FETCHED,
) -> Path:
    """The local folder of a checkpoint: ``model`` itself, or the hub's snapshot, fetched if necessary.

    Only top-level files that match ``patterns`` are fetched; by default json, safetensors, the chat template.

    Raises:
        ValueError: a path does not exist or is not a folder; a hub id is not found, or not cached while offline.
    """
    text = str(model)
    try:
        folder = Path(model).expanduser()
    except RuntimeError:  # ~user for a user who does not exist
        folder = Path(model)
    if text and os.path.isdir(folder):  # noqa: PTH112  (False for a name that is too long, where Path raises)
        return folder
    if not text or os.path.exists(folder):  # noqa: PTH110
        raise ValueError(f"model is {text!r}, which is not a folder; expected a checkpoint's folder or a hub id")
    if isinstance(model, Path) or text[0] in "./~" or text.count("/") > 1 or "\\" in text:
        raise ValueError(f"model is {text!r}, a folder that does not exist; expected a folder or a hub id")
    # Given a commit, some versions of the hub's client request its list of files even when told to be offline.
    local_files_only = local_files_only or huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        return Path(
            huggingface_hub.snapshot_download(
                text,
                revision=revision,
                local_files_only=local_files_only,
                allow_patterns=list(patterns),
                ignore_patterns=["*/*"],
            )
        )
    except Exception as error:  # the hub client's errors differ between its versions and transports
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"model {text!r} at revision {revision or 'main'!r} cannot be obtained from the hub or its local "
            f"cache, and no folder of that name exists: {reason}"
        ) from error
