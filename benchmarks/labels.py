"""Labels per second: ``compute_labels`` against PEFT, which loads and runs one adapter at a time.

Both read the same adapter folders, made on the fly, and end with a delta each. PEFT's way is what one would write
without this library: one base model, ``load_adapter`` and ``set_adapter``, the probes padded to the longest in one
batch through the backbone (no logits), ``delete_adapter``. Each way lives in a process of its own, computes while the
others wait, and is timed in turn, after a first run that is reported apart: what a job pays once, such as the bare
model's own pass, is in that. Nothing is timed unless the deltas agree.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from compare import DisagreementError
from floor import Floor
from measure import Timing, machine_facts, peak_bytes, reset_peak, settle, timed
from probe_sets import PROBE_KINDS, probe_ids, tree_tokens
from rivals import last_hidden, padded
from safetensors.torch import load_file, save_file
from sizes import SIZES
from throughput import check_counts_and_json, exit_status, model_name, report
from torch import Tensor
from workers import set_threads
from workload import DTYPES, Workload, config_of, local_folder

from lora_delta import DifferentiableDeltaCompute
from lora_delta.labelling.labels import compute_labels
from lora_delta.labelling.settings import model_fingerprint
from lora_delta.labelling.table import DeltaLabels
from lora_delta.peft.adapters import save_peft_adapter
from qwen_functional.memory import keep_freed_memory

LABELS, PEFT, FLOOR = "compute_labels", "PEFT", "floor"
FLOAT32_TOLERANCE = 1e-4
# In a narrower dtype: so many times PEFT's own error against float32. Deltas are small differences of rounded numbers.
NARROW_FACTOR = 1.5
CHECKED = 4  # adapters


@dataclasses.dataclass(frozen=True)
class Job:
    """What every way is given. ``folders`` are the adapters'."""

    workload: Workload
    folders: tuple[str, ...]
    per_pass: int


class Labels:
    """This library: a table and a manifest on disk, in a new folder each time."""

    def __init__(self, job: Job) -> None:
        self.job = job
        config, weights = job.workload.engine_weights()
        self.delta = DifferentiableDeltaCompute(config, weights, job.workload.probes)
        self.fingerprint = model_fingerprint(config, weights)
        self.weights = list(weights.named_views(config).values())

    def label(self, n: int) -> Tensor:
        adapters = self.job.folders[:n]
        with tempfile.TemporaryDirectory() as scratch:
            report = compute_labels(
                self.delta,
                adapters,
                scratch,
                fingerprint=self.fingerprint,
                adapters_per_pass=self.job.per_pass,
                progress=False,
            )
            if len(report.computed) != n:
                raise RuntimeError(f"{n - len(report.computed)} of {n} adapters failed: {report.failed[:1]}")
            labels = DeltaLabels(scratch)
            return torch.stack([labels[adapter] for adapter in adapters])

    def one_pass(self) -> None:
        """The deltas of one pass, with nothing around them."""
        workload = dataclasses.replace(self.job.workload, adapters=min(self.job.per_pass, self.job.workload.adapters))
        config = self.delta.config
        self.delta.deltas(workload.spec.bind(config, workload.lora(config)))


class Peft:
    """transformers and PEFT, adapter by adapter."""

    def __init__(self, job: Job) -> None:
        import peft

        self.job = job
        model = job.workload.hf_model(with_lm_head=True)
        self.weights = list(model.parameters())
        self.ids, self.mask = padded(job.workload.probes, max(map(len, job.workload.probes)))
        self.backbone = model.model
        self.base = self._pooled()
        self.model: Any = peft.PeftModel.from_pretrained(
            model, job.folders[0], adapter_name="first", autocast_adapter_dtype=False
        ).eval()

    def label(self, n: int) -> Tensor:
        rows = []
        for folder in self.job.folders[:n]:
            # Neither random numbers nor float32 copies, which would be waste.
            options = {"autocast_adapter_dtype": False, "low_cpu_mem_usage": True}
            self.model.load_adapter(folder, "next", **options)
            self.model.set_adapter("next")
            rows.append(self._pooled() - self.base)
            self.model.set_adapter("first")
            self.model.delete_adapter("next")
        return torch.stack(rows)

    def _pooled(self) -> Tensor:
        with torch.inference_mode():
            outputs = self.backbone(input_ids=self.ids, attention_mask=self.mask, use_cache=False)
            return last_hidden(outputs.last_hidden_state, self.mask).mean(0)


class ForwardFloor(Floor):
    """The base model's matrix products of one pass, forwards alone."""

    def __init__(self, job: Job) -> None:
        rows = dataclasses.replace(job.workload, adapters=job.per_pass)
        super().__init__(rows)
        self.shapes = {name: shape for name, shape in self.shapes.items() if not name.endswith("_dx")}
        self.flop //= 2
        self.weights: list[Tensor] = []
        self.passes = -(-job.workload.adapters // job.per_pass)

    def label(self, n: int) -> None:
        for _ in range(self.passes):
            self.step()


WAYS: dict[str, type[Labels] | type[Peft] | type[ForwardFloor]] = {LABELS: Labels, PEFT: Peft, FLOOR: ForwardFloor}
_way: Any = None  # of this process
_loaded = 0  # bytes that it held before its first label


def _start(way: str, job: Job) -> None:
    global _way, _loaded
    torch.set_num_threads(job.workload.threads)
    keep_freed_memory()  # for all ways alike
    _way = WAYS[way](job)
    _loaded = settle(_way.weights)
    reset_peak()


def _check(n: int, path: str) -> None:
    save_file({"deltas": _way.label(n).contiguous()}, path)


def _timed(n: int) -> tuple[Timing, int, int]:
    """Seconds, and the peak and the weights' bytes of the process so far."""
    return timed(lambda: _way.label(n)), peak_bytes(), _loaded


def _pass_peak() -> int:
    """The peak of the process in one pass."""
    reset_peak()
    _way.one_pass()
    peak = peak_bytes()
    reset_peak()
    return peak


def process(way: str, job: Job) -> ProcessPoolExecutor:
    """A process of its own, a fresh interpreter."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start, (way, job))


def deltas_of(way: str, job: Job, n: int, scratch: Path) -> Tensor:
    """The first ``n`` deltas, from a process that ends then."""
    with process(way, job) as worker:
        worker.submit(_check, n, str(scratch / way)).result()
    return load_file(scratch / way)["deltas"].double()


def agreement(job: Job, scratch: Path) -> dict[str, float]:
    """Relative Frobenius errors over some adapters; raises :class:`DisagreementError`.

    In float32 compute_labels against PEFT. Else both against PEFT in float32 on the same rounded numbers.
    """
    n, dtype = min(CHECKED, len(job.folders)), job.workload.dtype
    wide = dataclasses.replace(job.workload, dtype=torch.float32, rounded_to=dtype)
    reference = deltas_of(PEFT, dataclasses.replace(job, workload=wide), n, scratch)
    ways = (LABELS,) if dtype == torch.float32 else (LABELS, PEFT)
    errors = {w: float((deltas_of(w, job, n, scratch) - reference).norm() / reference.norm()) for w in ways}
    limit = FLOAT32_TOLERANCE if dtype == torch.float32 else NARROW_FACTOR * errors[PEFT]
    if not errors[LABELS] <= limit:
        raise DisagreementError(f"deltas are off by {errors[LABELS]:.1e}, expected at most {limit:.1e}")
    return errors


def save_adapters(workload: Workload, folder: Path) -> tuple[str, ...]:
    """Random adapters, A as PEFT starts it and B small but not zero, each in a folder."""
    config = workload.config()
    tensors = workload.lora(config)
    for index in range(workload.adapters):
        one = {name: tensor[index] for name, tensor in tensors.items()}
        save_peft_adapter(folder / f"adapter-{index:04d}", workload.spec, one, "a/base", config=config)
    return tuple(str(path) for path in sorted(folder.iterdir()))


def measured(job: Job, rounds: int, scratch: Path) -> dict[str, Any]:
    """Everything about one dtype, ready for json."""
    n = job.workload.adapters
    report("checking that the deltas agree")
    errors = agreement(job, scratch)
    ways: dict[str, dict[str, Any]] = {way: {"seconds": [], "others": []} for way in WAYS}
    with ExitStack() as stack:
        workers = {way: stack.enter_context(process(way, job)) for way in WAYS}
        pass_peak = workers[LABELS].submit(_pass_peak).result()
        for turn in range(rounds + 1):
            for way in [*WAYS][turn % len(WAYS) :] + [*WAYS][: turn % len(WAYS)]:
                timing, peak, loaded = workers[way].submit(_timed, n).result()
                report(f"{f'round {turn} of {rounds}' if turn else 'first run'}: {way} {timing.seconds:.3f} s")
                entry = ways[way]
                if turn == 0:
                    entry.update(first_seconds=timing.seconds, peak_bytes=peak, weights_bytes=loaded)
                else:
                    entry["seconds"].append(timing.seconds)
                    entry["others"] += [] if timing.others is None else [timing.others]
    floor = ways.pop(FLOOR)
    scale = n / (job.per_pass * -(-n // job.per_pass))  # the floor's last pass is a full one
    floor_seconds = scale * statistics.median(floor["seconds"])
    for entry in ways.values():
        entry["median"] = statistics.median(entry["seconds"])
        entry["labels_per_second"] = n / entry["median"]
        entry["share_of_floor"] = floor_seconds / entry["median"]
    return {
        "dtype": str(job.workload.dtype).removeprefix("torch."),
        "errors": errors,
        "ways": ways,
        "floor": {"seconds": floor_seconds, "others": floor["others"]},
        "ratio": ways[PEFT]["median"] / ways[LABELS]["median"],
        "pass_peak_bytes": pass_peak,
    }


def table(run: dict[str, Any]) -> str:
    """One dtype's results as Markdown."""
    header = (run["dtype"], "labels/s", "seconds (min to max)", "first run", "peak GB", "over weights GB", "floor")
    rows: list[Sequence[str]] = [header, ("---", *["---:"] * (len(header) - 1))]
    for way, entry in run["ways"].items():
        seconds = entry["seconds"]
        rows.append(
            (
                way,
                f"{entry['labels_per_second']:.3g}",
                f"{entry['median']:.3g} ({min(seconds):.3g} to {max(seconds):.3g})",
                f"{entry['first_seconds']:.3g}",
                f"{entry['peak_bytes'] / 1e9:.2f}",
                f"{(entry['peak_bytes'] - entry['weights_bytes']) / 1e9:.2f}",
                f"{entry['share_of_floor']:.2f}",
            )
        )
    lines = ["", *("| " + " | ".join(row) + " |" for row in rows), ""]
    errors = ", ".join(f"{way} {error:.1e}" for way, error in run["errors"].items())
    lines.append(f"compute_labels is {run['ratio']:.2f} times as fast. Errors against PEFT in float32: {errors}.")
    peak, of_pass = run["ways"][LABELS]["peak_bytes"], run["pass_peak_bytes"]
    lines.append(f"compute_labels peaks at {peak / of_pass:.3f} times the {of_pass / 1e9:.2f} GB of one pass alone.")
    lines.append(f"Floor: the base model's matrix products forwards alone, {run['floor']['seconds']:.3g} s.")
    others = max((o for e in (*run["ways"].values(), run["floor"]) for o in e["others"]), default=0.0)
    if others > 0.1:
        lines.append(f"Disturbed: during one of the runs other processes kept {others:.1f} CPUs busy.")
    return "\n".join(lines)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", metavar="ID_OR_FOLDER", help="a Qwen2 checkpoint")
    model.add_argument("--size", choices=SIZES, help="random weights of this size")
    parser.add_argument("--probes", choices=PROBE_KINDS, default="generic")
    parser.add_argument("--adapters", type=int, default=16, metavar="N")
    parser.add_argument("--adapters-per-pass", type=int, default=8, metavar="G")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    options = parser.parse_args(argv)
    check_counts_and_json(parser, options, ("adapters", "adapters_per_pass", "rank", "rounds", "threads"))
    return options


def record_of(options: argparse.Namespace) -> dict[str, Any]:
    """Run what the options ask for, printing as it goes; what was measured, ready for json."""
    folder = local_folder(options.model) if options.model else None
    probes = probe_ids(folder, options.probes, config_of(folder, options.size).vocab_size)
    counts = {"count": len(probes), "tokens": sum(map(len, probes)), "tree_tokens": tree_tokens(probes)}
    record: dict[str, Any] = {
        "machine": machine_facts(options.threads),
        "model": model_name(options),
        "probes": {"kind": options.probes, **counts},
        "adapters": options.adapters,
        "adapters_per_pass": options.adapters_per_pass,
        "rank": options.rank,
        "runs": [],
    }
    print(
        f"{record['model']}, {options.adapters} adapters of rank {options.rank}, {options.adapters_per_pass} per pass, "
        f"{counts['count']} {options.probes} probes of {counts['tokens']} tokens, {options.threads} threads",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.dtype:
            workload = Workload(
                folder, options.size, probes, options.adapters, options.rank, DTYPES[name], options.threads
            )
            folders = save_adapters(workload, Path(scratch) / name)
            run = measured(Job(workload, folders, options.adapters_per_pass), options.rounds, Path(scratch))
            record["runs"].append(run)
            print(table(run), flush=True)
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0, or 1 where the ways disagree or one of them fails."""
    options = arguments(argv)
    set_threads(options.threads)
    return exit_status(options, record_of, (RuntimeError, ValueError, OSError))  # a process that died is the first


if __name__ == "__main__":
    sys.exit(main())
