"""Finding adapters: from folders, lists and hub ids to their files. Only lists are read."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qwen_functional.files import read_lines
from qwen_functional.hub import resolve_checkpoint

from .config import CONFIG_FILE

WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def find_adapters(paths: str | Path | Iterable[str | Path]) -> list[str | Path]:
    """Sources for :func:`lora_delta.load_peft_adapter`, in the order given and without duplicates.

    Each of ``paths`` is one of these:

    * an adapter's folder, which holds ``adapter_config.json``;
    * a folder of such folders, taken in the order of their names;
    * a glob pattern (``*``, ``?``, ``[...]``, ``**``): the matching folders of either kind are taken, sorted;
    * a ``.txt`` file with one of the above or a hub id per line, and comments from ``#`` on. Relative paths are
      relative to the file;
    * a hub id, ``owner/name``, where no such folder exists.

    Returns:
        A Path for a folder, a str for a hub id.

    Raises:
        ValueError: a path does not exist or leads to no adapter, or there is none at all.
    """
    found: dict[str, str | Path] = {}
    for entry in [paths] if isinstance(paths, (str, Path)) else paths:
        for source in _expanded(entry):
            found.setdefault(str(source.resolve()) if isinstance(source, Path) else source, source)
    if not found:
        raise ValueError("no adapter is given, expected folders, globs, .txt files or hub ids")
    return list(found.values())


def _expanded(entry: str | Path, parent: Path = Path(), lists: bool = True) -> list[str | Path]:
    text = os.path.expanduser(entry)  # noqa: PTH111  (leaves ~user be where there is no such user)
    path = parent / text
    if not text:
        raise ValueError("an adapter's path is empty, expected a folder, a glob, a .txt file or a hub id")
    if path.is_dir():
        folders = _adapters_in(path)
        if not folders:
            raise ValueError(f"{path} holds no {CONFIG_FILE}, and none of its folders does; expected adapters")
        return folders
    if path.suffix == ".txt" and lists:
        return _listed(path)
    if not path.exists() and re.search(r"[*?[]", text):
        try:
            matches = sorted(glob.glob(str(Path(glob.escape(str(parent)), text)), recursive=True))  # noqa: PTH207
        except RecursionError:
            raise ValueError(f"{path} has too many parts, expected a glob that leads to adapters") from None
        folders = [folder for match in matches if Path(match).is_dir() for folder in _adapters_in(Path(match))]
        if not folders:
            raise ValueError(f"{path} matches no adapter, expected folders with {CONFIG_FILE}")
        return folders
    if isinstance(entry, str) and not path.exists() and path.suffix != ".txt" and _HUB_ID.fullmatch(entry):
        return [entry]
    what = "is not a folder" if path.exists() else "does not exist"
    raise ValueError(f"{path} {what}, expected an adapter's folder, a folder of them, a glob, a .txt file or a hub id")


def _adapters_in(folder: Path) -> list[str | Path]:
    """The folder itself if it is an adapter, else those of its subfolders that are."""
    if (folder / CONFIG_FILE).is_file():
        return [folder]
    return [child for child in sorted(folder.iterdir()) if (child / CONFIG_FILE).is_file()]


def _listed(file: Path) -> list[str | Path]:
    lines = read_lines(file, "a text file of adapters, one per line")
    found = []
    for number, line in enumerate(lines, 1):
        entry = re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip()
        try:
            found += _expanded(entry, file.parent, lists=False) if entry else []
        except (ValueError, OSError) as error:
            raise ValueError(f"{file}, line {number}: {error}") from None
    if not found:
        raise ValueError(f"{file} lists no adapter, expected one per line")
    return found


def adapter_file(source: str | Path, name: str, **where: Any) -> Path:
    """One of an adapter's two files, fetched if needed: from a folder, or from a hub id, with options ``where``.

    Raises:
        ValueError: the folder, the hub id or the file is not found; there is only a pickle.
    """
    try:
        folder = resolve_checkpoint(source, **where, patterns=(name,))
    except ValueError as error:
        raise ValueError(f"LoRA adapter {str(source)!r}: {error}") from error
    if (folder / name).is_file():
        return folder / name
    if name == WEIGHTS_FILE and (folder / _PICKLE).is_file():
        raise ValueError(
            f"{folder} has its weights only in the pickle {_PICKLE}, which is never loaded because it can run code; "
            f"expected {WEIGHTS_FILE}. If you trust it, load it with PEFT and call save_pretrained"
        )
    raise ValueError(f"{folder} has no {name}, expected {CONFIG_FILE} and {WEIGHTS_FILE} (never pickles)")
