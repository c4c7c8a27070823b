"""The doors through which other people's files come in, each with valid files and a way to corrupt them.

A kind of input is a door and a choice of the files to corrupt. :data:`KINDS` has them all.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from spoil import (
    PATHS,
    REGEXES,
    TEMPLATES,
    spoiled_bytes,
    spoiled_json,
    spoiled_json_lines,
    spoiled_place,
    spoiled_safetensors,
    spoiled_text,
    spoiled_toml,
)  # fmt: skip
from valid_files import RUN, TEXT_RUN

from lora_delta import DeltaLabels, DifferentiableDeltaCompute, load_peft_adapter
from lora_delta.cli import main
from lora_delta.embedded import embedded_checkpoint
from lora_delta.generate.checkpoints import CHECKPOINT, PREVIOUS, read_checkpoint
from lora_delta.generate.runs import RunConfig, load_run, read_prompts
from lora_delta.generate.text_lines import TextReader
from lora_delta.generate.texts import TextSet
from lora_delta.peft.adapters import find_adapters
from lora_delta.probes.chat import read_probes
from lora_delta.teachers import load_top_k
from qwen_functional import load_pretrained, read_config

TEXTS = ["a probe", "café, 日本語 🙂\n"]
_WORDS = (*PATHS, "float16", "float99", "cuda", "gpu", "meta", "cpu:7", "mean", "none", 3, 4096, 10**6, [-1, 0], 1e-9)
_PROBES = ("a probe", "", " ", "x" * 100_000, "\u0301" * 10_000, "<|im_start|>", "# a comment")
_ADAPTER = (*REGEXES, *PATHS, ["q_proj", "v_proj"], "all-linear", {"q_proj": 3}, {r".*": 1}, {"(a+)+$": 2}, [0], 5000)
_TOKENIZER = (
    *REGEXES, "NFC", "NFKD", "BPE", "WordPiece", "ByteLevel", "Replace", "Sequence", "Metaspace", "Split", 256, 10**9,
    {"type": "Replace", "pattern": {"String": ""}, "content": "aaaaaaaaaaaaaaaa"},
    {"type": "Replace", "pattern": {"Regex": "(.*)*"}, "content": "a" * 10_000},
    {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 99}] * 9},
    {"type": "Split", "pattern": {"Regex": "(a|a)*b"}, "behavior": "Isolated", "invert": False},
    {"type": "Prepend", "prepend": "a" * 10_000}, {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "no", "type_id": 0}}], "pair": [],
     "special_tokens": {}},
)  # fmt: skip


class Canary:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.ran}",)


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        files: globs of the valid files that the door reads; a matching one is corrupted.
        needs: other folders and files that must be there.
        open: the door, called with the folder of the input; a command returns an exit status.
        names: a regular expression that a refusal must match, for what it has to name.
        words: values to put in place of others.
        prepare: a further change to the files of an input, given a path that must never be created.
        share: how many inputs of this kind are drawn for each of a kind with share 1.
        outs: what the door may write to.
        seconds: the time limit. A template is stopped after 5 s of processor time, but the processor is shared.
    """

    files: tuple[str, ...]
    open: Callable[[Path, Random], object]
    names: str = ""
    needs: tuple[str, ...] = ()
    words: tuple[Any, ...] = ()
    prepare: Callable[[Path, Random, Path], object] | None = None
    share: float = 1.0
    outs: tuple[str, ...] = ()
    seconds: float = 10.0

    def make(self, valid: Path, folder: Path, chance: Random, outside: Path) -> list[str]:
        """Write the files of an input, some of them corrupted; returns the names of those."""
        for need in {*self.needs, *(pattern.split("/")[0] for pattern in self.files)}:
            source = valid / need
            shutil.copytree(source, folder / need) if source.is_dir() else shutil.copy(source, folder / need)
        spoiled: list[Path] = []
        for _ in range(chance.choice((1, 1, 1, 2)) if self.files else 0):
            pattern = chance.choice(self.files)
            matching = sorted(path for path in folder.glob(pattern) if path.is_file() and path not in spoiled)
            if matching:
                spoiled.append(self._spoil(chance.choice(matching), chance, outside))
        if self.prepare is not None:
            self.prepare(folder, chance, outside.parent / "ran")
        return [str(path.relative_to(folder)) for path in spoiled]

    def _spoil(self, path: Path, chance: Random, outside: Path) -> Path:
        ran = outside.parent / "ran"
        words = [w.replace("{outside}", str(outside)) if isinstance(w, str) else w for w in self.words or _WORDS]
        if chance.random() < 0.08:
            spoiled_place(path, chance, outside)
            return path
        data = path.read_bytes()
        if path.suffix in (".pt", ".bin"):
            path.write_bytes(pickle.dumps({"a": Canary(ran)}) if chance.random() < 0.2 else spoiled_bytes(data, chance))
            if chance.random() < 0.2:
                torch.save({"generator": Canary(ran), "options": "{}", "steps": 1}, path)
        elif path.suffix == ".safetensors":
            path.write_bytes(spoiled_safetensors(data, chance))
        elif path.suffix == ".jsonl":
            path.write_bytes(spoiled_json_lines(data.decode(), chance, words))
        elif path.suffix == ".toml":
            path.write_bytes(spoiled_toml(TEXT_RUN if path.name == "texts.toml" else RUN, chance, words))
        elif path.suffix == ".txt":
            texts = [word for word in words if isinstance(word, str)]
            path.write_bytes(spoiled_text(data.decode(), chance, texts))
        elif path.suffix != ".json" or chance.random() < 0.1:
            path.write_bytes(spoiled_bytes(data, chance))
        else:
            path.write_bytes(spoiled_json(data.decode(), chance, words))
        return path


def _put_template(folder: Path, chance: Random, ran: Path) -> None:
    """Use one or two templates of the list, or the valid one mixed with them or corrupted."""
    file = folder / "base" / "tokenizer_config.json"
    config = json.loads((embedded_checkpoint() / "tokenizer_config.json").read_text())
    own, text = config["chat_template"], chance.choice(TEMPLATES)
    match chance.randrange(4):
        case 0:
            text = chance.choice(TEMPLATES) + text
        case 1:
            at = chance.randrange(len(own))
            text = own[:at] + text + own[at:]
        case 2:
            text = spoiled_text(own, chance, TEMPLATES).decode("utf-8", "replace")
    text = text.replace("{ran}", str(ran))
    if chance.random() < 0.5:
        (folder / "base" / "chat_template.jinja").write_bytes(text.encode("utf-8", "surrogatepass"))
    else:
        file.write_text(json.dumps({**config, "chat_template": text}))


def _put_pickle(folder: Path, chance: Random, ran: Path) -> None:
    """Sometimes store the adapter's tensors only as a pickle."""
    if chance.random() < 0.1:
        weights = folder / "teachers" / "a" / "adapter_model.safetensors"
        if not weights.is_dir():
            weights.unlink(missing_ok=True)
        weights.with_suffix(".bin").write_bytes(pickle.dumps(Canary(ran)))


def _remove_run(folder: Path, chance: Random, ran: Path) -> None:
    """Sometimes remove the runs, as if there were none yet."""
    if chance.random() < 0.5:
        for run in ("run", "textrun"):
            shutil.rmtree(folder / run)


def _probes(folder: Path, chat: bool) -> None:
    read_probes(folder / "base", TEXTS, 16, chat=chat)


def _delta(folder: Path) -> None:
    delta = DifferentiableDeltaCompute.from_pretrained(folder / "base", TEXTS, dtype=torch.float32, device="cpu")
    assert delta.base_activation.isfinite().all()


def _adapter(folder: Path, chance: Random) -> None:
    config = read_config(folder / "base") if chance.random() < 0.5 else None
    spec, tensors = load_peft_adapter(folder / "teachers" / "a", config=config)
    if config is not None:
        spec.bind(config, tensors)


def _labels(folder: Path) -> None:
    written = {row.numpy().tobytes() for row in DeltaLabels(folder.parents[1] / "valid" / "deltas").values()}
    labels = DeltaLabels(folder / "deltas")
    assert {labels[name].numpy().tobytes() for name in labels} <= written, "a delta that nobody has written"
    assert {row.numpy().tobytes() for row in labels.tensor} <= written, "a row that nobody has written"
    if len(labels):
        labels.dataset(dict.fromkeys(labels, 0), "tensors")[0]


def _run(folder: Path) -> None:
    read = load_run(folder / "run", "cpu").generator.state_dict()
    valid = folder.parents[1] / "valid" / "run"
    states = [read_checkpoint(valid / name)["generator"] for name in (CHECKPOINT, PREVIOUS)]
    same = [all(tensor.equal(written[name]) for name, tensor in read.items()) for written in states]
    assert any(same), "parameters that nobody has written"


def _texts(folder: Path, chance: Random) -> None:
    """Whichever lines are accepted, what is read back is complete."""
    context = chance.choice((None, "{condition}{prompt}"))
    reader = TextReader(folder / "base", max_tokens=200, vocab_size=259, max_condition=64, context=context)
    given: dict[str, Any] = {"on_bad_line": chance.choice(("error", "skip")), "progress": False}
    found = TextSet.compiled(folder / "texts.jsonl", folder / "made", reader, **given)
    for index in range(len(found)):
        assert found.conditions[index], "a condition that is empty"
        for text in found.texts(index):
            assert all(len(prompt) + len(completion) >= 2 for prompt, completion in text.pairs), "no target"
            assert len(text.contexts) == (len(text.pairs) if context else 0), "another number of contexts"


def _tokenized(folder: Path) -> None:
    (place,) = (folder / "textrun").glob("texts-*")
    (valid,) = (folder.parents[1] / "valid" / "textrun").glob("texts-*")
    found, written = TextSet.opened(place), TextSet.opened(valid)
    assert list(found.conditions) == list(written.conditions), "conditions that nobody has written"
    for line in range(written.n_texts):
        pairs = zip(found.text(line).pairs, written.text(line).pairs, strict=True)
        assert all(a.equal(b) for one, other in pairs for a, b in zip(one, other, strict=True)), "other tokens"


def _label(folder: Path, chance: Random) -> int:
    drawn = {
        "--layer": ("-1", "0,1", "-1,0", "5", "", ",", "x", "1" * 5000), "--pooling": ("mean", "none"),
        "--max-length": ("256", "1", "0", "-1", str(2**63)), "--adapters-per-pass": ("2", "1", "0", "-3", str(10**12)),
        "--device": ("cpu", "gpu", "", "cuda:99", "meta", "cpu:1"), "--stream": ("disk", "host"), "--chat": (None,),
    }  # fmt: skip
    given = ["--model", str(folder / "base"), "--dtype", "float32"]
    if chance.random() < 0.5:
        given += ["--out", str(folder / "deltas")]
    else:
        given += ["--out", str(folder / "new"), "--probes", str(folder / "probes.txt")]
    for option, values in drawn.items():
        if chance.random() < 0.12:
            value = chance.choice(values)
            given += [option] if value is None else [f"{option}={value}"]
    given += [str(folder / chance.choice(("teachers", "list.txt", "teachers/*", "teachers/a")))]
    return main(["label", "--quiet", *given])


def _train(folder: Path, chance: Random) -> int:
    """A drawn run may take days: one that is under way after a few seconds is ended."""
    run = chance.choice(("run.toml", "texts.toml"))
    log, out = drawn_run_folder(folder, run) / "metrics.jsonl", ["train", "--quiet", str(folder / run)]
    began = time.time()
    enough = threading.Timer(5, os.kill, (os.getpid(), signal.SIGTERM))
    enough.start()
    try:
        status = main(out)
    finally:
        enough.cancel()
    return 0 if status == 143 and log.stat().st_mtime > began else status


def _generate(folder: Path, chance: Random) -> int:
    prompts, out = str(folder / chance.choice(("new.jsonl", "probes.txt"))), str(folder / "generated")
    return main(["generate", "--quiet", "--run", str(folder / "run"), "--prompts", prompts, "--out", out])


def _plot(folder: Path, chance: Random) -> int:
    classes = ["--classes", str(folder / "classes.json")] if chance.random() < 0.7 else []
    return main(["plot", str(folder / "deltas"), *classes, "--out", str(folder / "plot.png")])


_OPTIONS = "tensor_parallel|device|layer|max_length|adapters_per_pass|probes|classes|deltas|model|template"
_NAMED = rf"/inputs/|config\.json|({_OPTIONS}|--\w+)[ :,]"
_BASE = ("base/config.json", "base/*.json", "base/*.safetensors")
KINDS: dict[str, Kind] = {
    "weights": Kind(("base/model.safetensors",), lambda f, _: load_pretrained(f / "base"),
                    r"model\.safetensors|config field|/base has"),
    "index": Kind(("sharded/*index.json",), lambda f, _: load_pretrained(f / "sharded"),
                  r"index\.json|\.safetensors|config field|tensor "),
    "config": Kind(("base/config.json",), lambda f, _: _delta(f), r"config|tensor |layer|probes"),
    "tokenizer": Kind(("base/tokenizer.json",), lambda f, c: _probes(f, c.random() < 0.5), r"tokenizer|probe",
                      words=_TOKENIZER),
    "tokenizer_config": Kind(("base/tokenizer_config.json",), lambda f, c: _probes(f, c.random() < 0.7),
                             "token|template|probe", ("base",), (*_WORDS, *TEMPLATES, "NFC", "Qwen2Tokenizer"),
                             seconds=40.0),
    "template": Kind((), lambda f, _: _probes(f, chat=True), r"template|tokenizer|probe", ("base",),
                     prepare=_put_template, share=1.5, seconds=40.0),
    "adapter_config": Kind(("teachers/a/adapter_config.json",), _adapter, r"adapter|field|pattern|rank|alpha",
                           ("base",), _ADAPTER, _put_pickle, share=2),
    "adapter": Kind(("teachers/a/*",), _adapter, r"adapter|field|tensor", ("base",), _ADAPTER, _put_pickle),
    "top_k": Kind(("said/*",), lambda f, c: load_top_k(f / "said" / "said.safetensors", c.choice((None, 30))), r"said"),
    "texts": Kind(("texts.jsonl",), _texts, r"texts\.jsonl", ("base",), _PROBES, seconds=40.0, outs=("made",)),
    "tokenized": Kind(("textrun/texts-*/*",), lambda f, _: _tokenized(f), r"texts-"),
    "labels": Kind(("deltas/*",), lambda f, _: _labels(f), r"deltas|adapter", ("teachers",)),
    "run": Kind(("run/*",), lambda f, _: _run(f), r"run|model|config\.json", ("base",)),
    "toml": Kind(("run.toml", "texts.toml"), lambda f, c: RunConfig.from_toml(f / c.choice(("run.toml", "texts.toml"))),
                 r"\.toml"),
    "prompts": Kind(("new.jsonl", "probes.txt"), lambda f, c: read_prompts(
        f / c.choice(("new.jsonl", "new.jsonl", "probes.txt")), "name"), r"new\.jsonl|probes\.txt|prompts",
        words=(*PATHS, *_PROBES)),
    "list": Kind(("list.txt",), lambda f, _: find_adapters([str(f / "list.txt")]), r"list\.txt|adapter|/",
                 ("teachers",), PATHS),
    "label": Kind((*_BASE, "teachers/*/*", "probes.txt", "list.txt", "deltas/*"), _label, _NAMED,
                  words=(*_ADAPTER, *_PROBES), share=0.6, outs=("deltas", "new")),
    "train": Kind(("run.toml", "texts.toml", "prompts.jsonl", "run/*", "deltas/*", "teachers/*/*", "texts.jsonl",
                   "textrun/*", "textrun/*/*"), _train, _NAMED,
                  needs=("base",), words=_WORDS, prepare=_remove_run, share=0.6, outs=("run", "textrun")),
    "generate": Kind(("run/*", "new.jsonl", "probes.txt"), _generate, _NAMED, needs=("base",), words=(*PATHS, *_PROBES),
                     share=0.6, outs=("generated",)),
    "plot": Kind(("deltas/*", "classes.json"), _plot, _NAMED, needs=("teachers",), share=0.3, outs=("plot.png",)),
}  # fmt: skip
COMMANDS = ("label", "train", "generate", "plot")


def drawn_run_folder(folder: Path, run: str) -> Path:
    """The output folder that a drawn file names, as a user may; the valid file's where it cannot be read."""
    with contextlib.suppress(Exception):
        return (folder / RunConfig.from_toml(folder / run).out).resolve()
    return folder / ("run" if run == "run.toml" else "textrun")


def outcome(kind: str, folder: Path, chance: Random) -> tuple[str, str]:
    """Open an input at its door; returns ("succeeded", "refused" or what is wrong; the message)."""
    said, status = io.StringIO(), None
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            status = KINDS[kind].open(folder, chance)
    except ValueError as error:
        return _refused(str(error), KINDS[kind].names) if kind not in COMMANDS else ("raised", repr(error))
    except SystemExit as error:  # argparse: usage, then one line
        words = said.getvalue()
        return ("refused" if error.code == 2 and "error: " in words else f"exit {error.code}"), words
    except MemoryError:
        return "memory", ""
    except BaseException as error:
        return "raised", f"{type(error).__name__}: {error}"
    words = said.getvalue()
    if not status or kind not in COMMANDS:
        return "succeeded", words
    lines = [line for line in words.splitlines() if not line.startswith("cut to ")]
    if status == 1 and not lines:
        return "refused", words  # some adapters were refused, on stdout
    clear = status == 2 and len(lines) == 1 and lines[0].startswith(f"lora-delta {kind}: ") and len(lines[0]) < 3000
    if clear and not re.search(KINDS[kind].names, lines[0]):
        return "names nothing", words
    return ("refused" if clear else f"exit {status}"), words


def _refused(words: str, names: str) -> tuple[str, str]:
    return ("refused" if re.search(names, words) else "names nothing"), words
