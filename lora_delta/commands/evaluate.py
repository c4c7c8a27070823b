"""``lora-delta evaluate``."""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from qwen_functional.dtypes import DTYPES
from qwen_functional.memory import keep_freed_memory


def add(subcommands: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    evaluate = subcommands.add_parser(
        "evaluate",
        help="judge generated adapters on texts, against controls",
        description="Loss and accuracy on texts under the adapters that generators write for their conditions, and "
        "how close their deltas come to those of the prompted base; compared with adapters for other conditions and "
        "for gibberish, their mean, the bare model and the prompted base. Conditions that the first run has seen are "
        "reported separately. With --adapters it judges any PEFT folders.",
    )
    add_to = evaluate.add_argument
    add_to("--run", type=Path, nargs="+", default=[], dest="folders", metavar="RUN", help="run folders, a seed each")
    add_to("--data", type=Path, nargs="+", required=True, metavar="FILE", help="JSON lines of texts, as for train")
    add_to("--prompts", type=Path, metavar="FILE", help="prompts, if the data's conditions are names in this file")
    add_to("--adapters", nargs="+", metavar="PATH", help="PEFT folders, named as the conditions; needs --model")
    add_to("--model", help="hub id or folder of the base model, without --run")
    add_to("--dtype", choices=DTYPES, default="float32", help="base model, without --run (default: %(default)s)")
    add_to("--teachers", type=Path, metavar="LABELS", help="teachers' labels, for controls; needs --teacher-prompts")
    add_to("--teacher-prompts", type=Path, metavar="FILE", help="the teachers' prompts, as for train")
    add_to("--context", help="the prompted base's context, made of {condition} and {prompt} (default: the run's)")
    add_to("--conditions", type=int, default=64, metavar="N", help="number per group, 0 for all (default: %(default)s)")
    add_to("--texts", type=int, default=16, metavar="N", help="number per condition, 0 for all (default: %(default)s)")
    add_to("--seed", type=int, default=0, help="seed for gibberish and intervals")
    add_to("--last", action="store_true", help="the last generator, not the best on held-out conditions")
    add_to("--out", type=Path, metavar="FOLDER", help="folder for verdict.json and verdict.png")
    add_to("--device", help="default: a GPU if there is one, else the CPU")
    add_to("--json", action="store_true", help="print the figures as JSON")
    add_to("--quiet", action="store_true", help="no progress bars")
    evaluate.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    from ..files import folder_lock, write_json
    from ..generate.judge import figures, table
    from ..plots.charts import plot_verdict

    if not options.folders and not options.adapters:
        raise ValueError("neither --run nor --adapters is given, expected one of them")
    if options.adapters and options.folders:
        raise ValueError("--adapters and --run are both given, expected one of them")
    if bool(options.adapters) != bool(options.model):
        raise ValueError("only one of --adapters and --model is given, expected both or neither")
    if bool(options.teachers) != bool(options.teacher_prompts) or (options.teachers and options.adapters):
        raise ValueError("--teachers and --teacher-prompts need each other and --run, expected both or neither")
    for name in ("conditions", "texts"):
        if getattr(options, name) < 0:
            raise ValueError(f"--{name} is {getattr(options, name)}, expected 0 or more")
    keep_freed_memory()
    with nullcontext() if options.out is None else folder_lock(options.out):
        cases, runs = _runs(options) if options.folders else _adapters(options)
        found = figures(cases, runs, seed=options.seed)
        if options.out is not None:
            write_json(options.out / "verdict.json", found)
            with suppress(ImportError):  # matplotlib is an extra
                plot_verdict(found, options.out / "verdict.png")
    print(json.dumps(found, indent=1) if options.json else table(found))
    return 0


def _limits(options: argparse.Namespace) -> Any:
    from ..generate.controls import Limits

    return Limits(options.conditions or None, options.texts or None)


def _prompts(path: Path | None) -> dict[str, list[str]] | None:
    from ..generate.prompts import read_prompts

    return None if path is None else read_prompts(path)


def _runs(options: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """The cases, and for each run the verdicts on each way."""
    from ..generate.controls import (
        base_judge,
        judge_base,
        judge_run,
        judge_teachers,
        read_cases,
        seen_conditions,
    )
    from ..generate.runs import load_run
    from ..labelling.settings import spec_of
    from ..labelling.table import DeltaLabels

    prompts, cases, verdicts = _prompts(options.prompts), list[Any](), list[Any]()
    first: Any = None
    for folder in options.folders:
        run = load_run(folder, options.device, last=options.last, lm_head=True)
        if first is None:
            first = run
            seen = seen_conditions(folder, run.facts)
        elif run.facts["model_sha256"] != first.facts["model_sha256"]:
            raise ValueError(f"{folder} has another base model than {options.folders[0]}, expected the same")
        of_texts: dict[str, Any] = dict(run.facts.get("texts") or {})
        given: dict[str, Any] = {"context": options.context or run.context, "limits": _limits(options)}
        given["chat_template_kwargs"] = of_texts.get("chat_template_kwargs")
        own = read_cases(
            options.data, run.folder, run.config, encoder=run.encoder, seen=seen, prompts=prompts,
            progress=not options.quiet, **given,
        )  # fmt: skip
        judge = base_judge(run.config, run.weights, own)
        ways = judge_run(run, judge, seed=options.seed)
        if options.teachers is not None:
            labels, of_teachers = DeltaLabels(options.teachers), _prompts(options.teacher_prompts) or {}
            spec = spec_of(labels.entry(next(iter(of_teachers)))["spec"])
            ways |= judge_teachers(labels, of_teachers, spec, run, judge)
        verdicts.append(ways | judge_base(judge))
        cases = cases or own
    return cases, verdicts


def _adapters(options: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    from ..generate.bases import load_base
    from ..generate.controls import base_judge, judge_adapters, judge_base, read_cases
    from ..peft.sources import find_adapters

    prompts = _prompts(options.prompts)
    folder, config, weights = load_base(options.model, options.dtype, options.device, lm_head=True)
    context = {} if options.context is None else {"context": options.context}
    cases = read_cases(
        options.data, folder, config, prompts=prompts, limits=_limits(options), progress=not options.quiet, **context
    )
    judge = base_judge(config, weights, cases)
    adapters = {Path(str(source)).name: source for source in find_adapters(options.adapters)}
    return cases, [judge_adapters(adapters, config, weights, judge) | judge_base(judge)]
