"""Labels of many adapters against transformers and PEFT, and between runs that stop, resume and differ."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import SPECS, hf_model, hidden_states_at_end, peft_model, random_lora, relative_error, tiny_config
from torch import Tensor

from lora_delta import DifferentiableDeltaCompute
from lora_delta.labelling import labels, units
from lora_delta.labelling.labels import compute_labels
from lora_delta.labelling.settings import model_fingerprint
from lora_delta.labelling.table import DeltaLabels
from lora_delta.labelling.units import share_a_pass
from lora_delta.peft.adapters import AdapterFiles, save_peft_adapter
from qwen_functional import LoraSpec, Qwen2Config, init_weights
from qwen_functional.backends.onednn import can_pack

CONFIG = tiny_config()
PROBES = [[5, 6, 7, 8], [5, 6, 9], [1], [5, 6, 7, 8, 9, 10]]
SPEC = LoraSpec(rank=3, alpha=5)


def make_delta(probes: Sequence[Sequence[int]] = PROBES, seed: int = 0, **options: Any) -> DifferentiableDeltaCompute:
    dtype, device = options.pop("dtype", torch.float32), options.pop("device", "cpu")
    return DifferentiableDeltaCompute(CONFIG, init_weights(CONFIG, seed, dtype, device), probes, **options)


def save(folder: Path, spec: LoraSpec = SPEC, seed: int = 0, config: Qwen2Config = CONFIG, factor: float = 1) -> None:
    tensors = {name: factor * t for name, t in random_lora(config, spec, seed=seed, dtype=torch.float32).items()}
    save_peft_adapter(folder, spec, tensors, base_model="a/base", config=config)


@pytest.fixture
def teachers(tmp_path: Path) -> Path:
    """A folder of five adapters, a to e."""
    for seed, name in enumerate("abcde"):
        save(tmp_path / "teachers" / name, seed=seed)
    return tmp_path / "teachers"


def label(adapters: Path | str, out: Path, **options: Any) -> labels.LabelReport:
    delta = options.pop("delta", None) or make_delta()
    return compute_labels(delta, [adapters], out, **{"adapters_per_pass": 2, "progress": False, **options})


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of adapters in each pass so far."""
    seen: list[int] = []
    compute = DifferentiableDeltaCompute.deltas

    def counted(delta: DifferentiableDeltaCompute, lora: Any) -> Tensor:
        seen.append(lora.n_adapters)
        return compute(delta, lora)

    monkeypatch.setattr(DifferentiableDeltaCompute, "deltas", counted)
    return seen


# --- The numbers ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_peft(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Adapters of every spec, written by PEFT itself, and {folder's name: per-probe deltas at two layers}."""
    folder, expected, layers = tmp_path_factory.mktemp("by_peft"), {}, (1, -1)
    weights = init_weights(CONFIG)
    bare = hf_model(CONFIG, weights)
    base = torch.stack([hidden_states_at_end(bare, None, ids, layers) for ids in PROBES], 1)
    for seed, (name, spec) in enumerate(SPECS.items()):
        model = peft_model(hf_model(CONFIG, weights), spec)
        tensors = random_lora(CONFIG, spec, seed=seed, dtype=torch.float32)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data.copy_(tensors[key.replace(".default", "")])
        model.save_pretrained(str(folder / name.replace(" ", "-")))
        with torch.no_grad():
            ends = torch.stack([hidden_states_at_end(model, None, ids, layers) for ids in PROBES], 1)
        expected[name.replace(" ", "-")] = ends - base  # (layers, P, H)
    return folder, expected


@pytest.mark.parametrize("per_pass", [1, 3, 8])
def test_labels_equal_peft_whoever_shares_a_pass(
    per_pass: int, by_peft: tuple[Path, dict[str, Tensor]], device: str, tmp_path: Path
) -> None:
    folder, expected = by_peft
    report = label(folder, tmp_path / "labels", adapters_per_pass=per_pass, delta=make_delta(device=device))
    read = DeltaLabels(tmp_path / "labels")
    assert (len(read), report.failed) == (len(SPECS), ())
    for name, delta in expected.items():
        assert relative_error(read[str(folder / name)], delta[1].mean(0)) <= 1e-4, name
        assert read.entry(str(folder / name))["norm"] == pytest.approx(delta[1].mean(0).norm().item(), rel=1e-4)
    assert read.entry(str(folder / "patterns"))["spec"]["rank_pattern"] == SPECS["patterns"].rank_pattern


def test_labels_of_layers_and_probes_equal_peft(
    by_peft: tuple[Path, dict[str, Tensor]], device: str, tmp_path: Path
) -> None:
    folder, expected = by_peft
    label(folder, tmp_path / "labels", delta=make_delta(layer=(1, -1), pooling="none", device=device))
    read = DeltaLabels(tmp_path / "labels")
    assert read.tensor.shape == (len(SPECS), 2, len(PROBES), CONFIG.hidden_size)
    for name, delta in expected.items():
        assert relative_error(read[str(folder / name)], delta) <= 1e-4, name
    assert read.settings["layer"] == [1, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", [list(SPECS), list(SPECS)[::-1]])
def test_an_untrained_adapter_among_others_has_a_zero_delta(dtype: torch.dtype, order: list[str], device: str) -> None:
    delta, loras = make_delta(dtype=dtype, device=device), []
    for name in order:
        tensors = random_lora(CONFIG, SPECS[name])
        zero = {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in tensors.items()}
        loras += [SPECS[name].bind(CONFIG, tensors), SPECS[name].bind(CONFIG, zero)]
    for some in (loras, loras[2:4], loras[:3], loras[5:6]):
        rows = delta.deltas(share_a_pass(some, dtype, device)).cpu()
        untrained = torch.tensor([not any(pair.B.any() for pair in lora.pairs.values()) for lora in some])
        assert torch.equal(rows.flatten(1).any(1), ~untrained)


def test_adapters_that_share_a_pass_keep_their_scales() -> None:
    spec, other = LoraSpec(rank=2, alpha=8), LoraSpec(rank=5, target_modules=("k_proj",), use_rslora=True)
    one, two = (s.bind(CONFIG, random_lora(CONFIG, s)) for s in (spec, other))
    both = share_a_pass([one, two], torch.float64)
    assert list(both.pairs) == list(one.pairs)
    k, v = both.pairs[0, "k_proj"], both.pairs[0, "v_proj"]
    assert k.A.shape[:2] == (2, 5)
    for index, lora in enumerate((one, two)):
        pair = lora.pairs[0, "k_proj"]
        assert torch.allclose(k.B[index] @ k.A[index], pair.scaling * pair.B[0] @ pair.A[0], rtol=1e-12, atol=0)
    assert not v.B[1].any()
    assert {pair.scaling for pair in both.pairs.values()} == {1.0}


# --- Runs -------------------------------------------------------------------------------------------------


def test_a_second_run_computes_and_writes_nothing(
    teachers: Path, tmp_path: Path, passes: list[int], device: str
) -> None:
    report = label(teachers, tmp_path / "labels", delta=make_delta(device=device))
    assert passes == [2, 2, 1]
    assert (report.computed, report.reused, report.labels) == (tuple(f"teachers/{n}" for n in "abcde"), (), 5)
    before = {file: file.read_bytes() for file in (tmp_path / "labels").iterdir()}
    report = label(str(teachers / "*"), tmp_path / "labels", delta=make_delta(device=device))
    assert passes == [2, 2, 1]
    assert (report.computed, len(report.reused), report.labels) == ((), 5, 5)
    assert before == {file: file.read_bytes() for file in (tmp_path / "labels").iterdir()}


def test_a_changed_adapter_gets_another_label_and_others_keep_theirs(
    teachers: Path, tmp_path: Path, passes: list[int]
) -> None:
    label(teachers, tmp_path / "labels")
    before = DeltaLabels(tmp_path / "labels")
    save(teachers / "c", seed=9)
    save(teachers / "f", LoraSpec(rank=1), seed=10)
    shutil.copytree(teachers / "a", teachers / "copy")
    report = label(teachers, tmp_path / "labels")
    assert passes == [2, 2, 1, 1, 1]  # units are made before files are read: "f" and "c" share no pass
    assert (set(report.computed), len(report.reused)) == ({"teachers/c", "teachers/f"}, 5)
    after = DeltaLabels(tmp_path / "labels")
    assert set(after.names) == {f"teachers/{name}" for name in ("a", "b", "c", "copy", "d", "e", "f")}
    assert torch.equal(after["teachers/copy"], before["teachers/a"])
    assert [torch.equal(after[name], before[name]) for name in before] == [True, True, False, True, True]
    label(teachers / "c", tmp_path / "fresh")
    assert relative_error(after["teachers/c"], DeltaLabels(tmp_path / "fresh")["teachers/c"]) <= 1e-5


OTHERS: dict[str, tuple[Callable[[], DifferentiableDeltaCompute], str]] = {
    "weights": (lambda: make_delta(seed=1), "model_sha256 is"),
    "probes": (lambda: make_delta(PROBES[:3]), "probes_sha256 is"),
    "order of the probes": (lambda: make_delta(PROBES[::-1]), "probes_sha256 is"),
    "layer": (lambda: make_delta(layer=0), "layer is -1 there and 0 here"),
    "layers": (lambda: make_delta(layer=[-1]), r"layer is -1 there and \[-1\] here"),
    "pooling": (lambda: make_delta(pooling="none"), "pooling is 'mean' there and 'none' here"),
    "dtype": (lambda: make_delta(dtype=torch.float64), "dtype is 'float32' there and 'float64' here"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_labels_of_other_settings_are_refused_before_any_pass(
    name: str, teachers: Path, tmp_path: Path, passes: list[int]
) -> None:
    label(teachers / "a", tmp_path / "labels")
    make, message = OTHERS[name]
    with pytest.raises(ValueError, match=message):
        label(teachers, tmp_path / "labels", delta=make())
    assert passes == [1]
    assert DeltaLabels(tmp_path / "labels").names == ["teachers/a"]


def test_the_fingerprint_is_that_of_the_cpu_on_every_device(device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        expected = model_fingerprint(CONFIG, init_weights(CONFIG, dtype=dtype))
        assert model_fingerprint(CONFIG, init_weights(CONFIG, dtype=dtype, device=device)) == expected


def test_the_fingerprint_sees_what_a_delta_sees_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_functional.weights.packing_pays", can_pack)
    weights = init_weights(CONFIG)
    known = model_fingerprint(CONFIG, weights)
    assert known == model_fingerprint(CONFIG, init_weights(CONFIG).prepack())
    assert isinstance(weights.lm_head, Tensor)
    weights.lm_head.zero_()
    assert known == model_fingerprint(CONFIG, weights)
    weights.blocks[2].gate_up_proj[-1, -1] += 1e-6
    assert known != model_fingerprint(CONFIG, weights)
    assert known != model_fingerprint(tiny_config(rope_theta=100.0), init_weights(CONFIG))


def spoil(teachers: Path) -> None:
    """Make three adapters bad: one for another model, one cut, and one so large that its delta overflows."""
    save(teachers / "b", config=tiny_config(hidden_size=28, num_attention_heads=7, num_key_value_heads=1))
    (teachers / "c" / "adapter_model.safetensors").write_bytes(b"1234")
    save(teachers / "d", factor=1e30)


def test_a_bad_adapter_is_its_own_failure_and_is_tried_again(teachers: Path, tmp_path: Path, device: str) -> None:
    spoil(teachers)
    report = label(teachers, tmp_path / "labels", delta=make_delta(device=device))
    read = DeltaLabels(tmp_path / "labels")
    assert read.names == ["teachers/a", "teachers/e"]
    reasons = {failure.name: failure.reason for failure in report.failed}
    assert set(reasons) == {"teachers/b", "teachers/c", "teachers/d"}
    for name, reason in (("b", "expected (3, 24)"), ("c", "truncated or corrupt"), ("d", "its delta is not finite")):
        assert reason in reasons[f"teachers/{name}"]
    assert {name: failure.reason for name, failure in read.failures.items()} == reasons
    before = {file: file.read_bytes() for file in (tmp_path / "labels").iterdir()}
    assert label(teachers, tmp_path / "labels", delta=make_delta(device=device)).failed == report.failed
    assert before == {file: file.read_bytes() for file in (tmp_path / "labels").iterdir()}
    for name in "bcd":
        save(teachers / name, seed=5)
    report = label(teachers, tmp_path / "labels", delta=make_delta(device=device))
    assert (len(report.computed), len(report.reused), report.failed) == (3, 2, ())
    assert DeltaLabels(tmp_path / "labels").failures == {}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_keeps_what_was_finished(
    error: type[BaseException], teachers: Path, tmp_path: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = DifferentiableDeltaCompute.deltas

    def interrupted(delta: DifferentiableDeltaCompute, lora: Any) -> Tensor:
        if len(passes) == 2:
            raise error
        return counted(delta, lora)

    with monkeypatch.context() as patch:
        patch.setattr(DifferentiableDeltaCompute, "deltas", interrupted)
        with pytest.raises(error):
            label(teachers, tmp_path / "labels")
    assert DeltaLabels(tmp_path / "labels").names == [f"teachers/{name}" for name in "abcd"]
    report = label(teachers, tmp_path / "labels")
    assert report.computed == ("teachers/e",)
    label(teachers, tmp_path / "whole")
    assert torch.equal(DeltaLabels(tmp_path / "labels").tensor, DeltaLabels(tmp_path / "whole").tensor)


def test_what_is_finished_can_be_read_while_a_job_is_at_work(
    teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[int] = []
    compute = DifferentiableDeltaCompute.deltas

    def watched(delta: DifferentiableDeltaCompute, lora: Any) -> Tensor:
        there.append(len(DeltaLabels(tmp_path / "labels")))
        return compute(delta, lora)

    monkeypatch.setattr(DifferentiableDeltaCompute, "deltas", watched)
    label(teachers, tmp_path / "labels")
    assert there == [0, 2, 4]
    assert {file.name for file in (tmp_path / "labels").iterdir()} == {"deltas.f32", "labels.jsonl", "manifest.json"}


def test_each_label_is_of_the_very_bytes_that_it_names_while_adapters_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two versions take turns: after each read of an adapter, and at arbitrary moments."""
    versions: dict[str, Tensor] = {}
    folders = [tmp_path / "versions" / str(seed) for seed in range(2)]
    for seed, folder in enumerate(folders):
        save(folder, seed=seed)
        label(folder, tmp_path / f"labels {seed}", adapters_per_pass=1)
        (known,) = DeltaLabels(tmp_path / f"labels {seed}").items()
        versions[AdapterFiles.read(folder).sha256] = known[1]
    names = [f"{index:02d}" for index in range(40)]
    for name in names:
        shutil.copytree(folders[0], tmp_path / "teachers" / name)
    ended, read = threading.Event(), AdapterFiles.read

    def replace(folder: Path, version: int) -> None:
        new = folder / f"new by {threading.get_ident()}"
        shutil.copy(folders[version] / "adapter_model.safetensors", new)
        new.replace(folder / "adapter_model.safetensors")

    def replace_all() -> None:
        while not ended.is_set():
            for index, name in enumerate(names):
                replace(tmp_path / "teachers" / name, index % 2)

    def read_and_replaced(source: str, **options: Any) -> AdapterFiles:
        files = read(source, **options)
        replace(Path(source), int(files.sha256 == next(iter(versions))))
        return files

    monkeypatch.setattr(AdapterFiles, "read", read_and_replaced)

    writer = threading.Thread(target=replace_all)
    writer.start()
    try:
        report = label(tmp_path / "teachers", tmp_path / "labels", adapters_per_pass=1)
    finally:
        ended.set()
        writer.join()
    found = DeltaLabels(tmp_path / "labels")
    assert (len(found), report.failed) == (len(names), ())
    for name, delta in found.items():
        assert torch.equal(delta, versions[found.entry(name)["sha256"]]), name
    assert {found.entry(name)["sha256"] for name in found} == set(versions), "nothing was replaced meanwhile"


def test_whatever_reading_an_adapter_raises_is_its_failure(
    teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (teachers / "a" / "adapter_config.json").write_text("[" * 100_000)
    fields = json.loads((teachers / "b" / "adapter_config.json").read_text())
    (teachers / "b" / "adapter_config.json").write_text(json.dumps({**fields, "r": float("inf")}))
    load = AdapterFiles.load

    def breaks(files: AdapterFiles, config: Qwen2Config | None = None) -> Any:
        if files.config_file.parent.name == "c":
            raise RecursionError
        return load(files, config)

    monkeypatch.setattr(AdapterFiles, "load", breaks)
    report = label(teachers, tmp_path / "labels")
    assert [failure.name for failure in report.failed] == ["teachers/a", "teachers/b", "teachers/c"]
    assert all(failure.reason and "\n" not in failure.reason for failure in report.failed)
    assert (report.failed[2].reason, len(report.computed)) == ("RecursionError", 2)


def test_a_damaged_delta_is_said_and_computed_again(teachers: Path, tmp_path: Path, passes: list[int]) -> None:
    label(teachers, tmp_path / "labels")
    before = {name: delta.clone() for name, delta in DeltaLabels(tmp_path / "labels").items()}
    with (tmp_path / "labels" / "deltas.f32").open("r+b") as table:
        table.seek(DeltaLabels(tmp_path / "labels").entry("teachers/c")["row"] * CONFIG.hidden_size * 4)
        table.write(b"\0\0\xc0\x7f")  # NaN
    shutil.copytree(teachers / "c", teachers / "copy")
    with pytest.warns(UserWarning, match="is not the delta of 'teachers/c' that was written there"):
        report = label(teachers, tmp_path / "labels")
    assert report.computed == ("teachers/c", "teachers/copy")
    after = DeltaLabels(tmp_path / "labels")
    assert torch.isfinite(after.tensor).all()
    for name, delta in before.items():
        assert relative_error(after[name], delta) <= 1e-5


def test_a_delta_of_exactly_zero_is_a_label_and_a_warning(teachers: Path, tmp_path: Path) -> None:
    save(teachers / "b", LoraSpec(rank=3, alpha=0))
    save(teachers / "untrained", factor=0)
    for reused in (0, 7 - 1):
        with pytest.warns(UserWarning, match="2 adapters have a delta of exactly zero, .*: teachers/b, teachers/unt"):
            report = label(teachers, tmp_path / "labels")
        assert (report.zero, report.failed) == (("teachers/b", "teachers/untrained"), ())
        assert len(report.reused) == reused
    assert not DeltaLabels(tmp_path / "labels")["teachers/b"].any()


def test_new_adapters_among_many_with_labels_share_passes(
    teachers: Path, tmp_path: Path, passes: list[int]
) -> None:
    label(teachers, tmp_path / "labels")
    for seed, name in enumerate(("a0", "c0", "f"), 20):
        save(teachers / name, seed=seed)
    report = label(teachers, tmp_path / "labels")
    assert (len(report.computed), len(report.reused), passes) == (3, 5, [2, 2, 1, 2, 1])
    assert len(DeltaLabels(tmp_path / "labels")) == 8


def test_bad_arguments_write_nothing(teachers: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file, expected a folder, or none yet"):
        label(teachers, tmp_path / "file")
    with pytest.raises(ValueError, match="adapters_per_pass is 0, expected 1 or more"):
        label(teachers, tmp_path / "labels", adapters_per_pass=0)
    with pytest.raises(ValueError, match="nothing does not exist"):
        label(tmp_path / "nothing", tmp_path / "labels")
    assert not (tmp_path / "labels").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_scale_of_a_half_precision_adapter_is_multiplied_in_the_precision_of_the_pass(dtype: torch.dtype) -> None:
    spec = LoraSpec(rank=3, alpha=1)
    tensors = random_lora(CONFIG, spec, 1, dtype=dtype)
    shared = share_a_pass([spec.bind(CONFIG, tensors)], torch.float32)
    for key, pair in spec.bind(CONFIG, tensors).pairs.items():
        torch.testing.assert_close(shared.pairs[key].B.double(), pair.B.double() / 3, rtol=1e-6, atol=0)


def test_new_adapters_come_first_and_in_passes_of_their_own(tmp_path: Path) -> None:
    names = ["a", "b", "c", "d", "e"]
    sources = {name: str(tmp_path / name) for name in names}
    assert units._units(sources, {"a", "d"}, 2) == [["b", "c"], ["e"], ["a", "d"]]
    assert units._units(sources, {"a", "b", "c", "d"}, 3) == [["e"], ["a", "b", "c"], ["d"]]


def test_the_base_model_is_named_among_the_settings(teachers: Path, tmp_path: Path) -> None:
    label(teachers, tmp_path / "out", model="a/model")
    assert DeltaLabels(tmp_path / "out").settings["model"] == "a/model"


@pytest.mark.parametrize("prepacked", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_a_job_goes_on_with_weights_packed_as_when_it_began(
    prepacked: bool, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_functional.weights.packing_pays", can_pack)
    delta = make_delta(prepack=packed)
    job = units.Job("", 0, [], prepacked, torch.get_num_threads())
    with labels._rounded_as(job, delta) as other:
        assert (other.weights.packed is not None) == prepacked
        assert (other is delta) == (prepacked == packed)
