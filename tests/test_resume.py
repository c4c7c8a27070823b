"""What a run leaves in its folder; whatever happens to that, the same call continues to the uninterrupted result."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import signal
import zipfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import DEVICES
from torch import Tensor
from training_case import BOTH, Case, options, training_case

from lora_delta.cli import Terminated
from lora_delta.files import UNFINISHED
from lora_delta.generate import checkpoints
from lora_delta.generate.checkpoints import CHECKPOINT, METRICS, PREVIOUS, RUN, RunFolder, newest_checkpoint
from lora_delta.generate.generator import LoRAGenerator
from lora_delta.generate.options import TrainingOptions
from lora_delta.identity import Identity

ASKED = options(checkpoint_every=2)


class Noisy(LoRAGenerator):
    """A generator that draws random numbers on its device in every step."""

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        return super().forward(torch.nn.functional.dropout(states, 0.2), mask)


class Crash(RuntimeError):
    """Ends a run that is to be resumed."""


@pytest.fixture(scope="module")
def case(device: str) -> Case:
    return training_case(device)


def run(
    case: Case,
    out: Path,
    asked: TrainingOptions = ASKED,
    at: int | None = None,
    how: Callable[[], None] | None = None,
    kind: type[LoRAGenerator] = Noisy,
) -> dict[str, Tensor]:
    """The parameters after a run; ``how`` disturbs it in the generator's forward number ``at``."""
    made, calls = case.generator(kind), list[None]()

    def count(*_: object) -> None:
        if len(calls) == at:
            crash() if how is None else how()
        calls.append(None)

    made.register_forward_pre_hook(count)
    case.train(made, asked, out)
    return {name: tensor.cpu() for name, tensor in made.state_dict().items()}


def crash() -> None:
    raise Crash


def crashed(case: Case, out: Path, at: int, asked: TrainingOptions = ASKED) -> None:
    with pytest.raises(Crash):
        run(case, out, asked, at)


def lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of the log, without what differs between runs."""
    read = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in read]


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


@dataclasses.dataclass(frozen=True)
class Whole:
    """An uninterrupted run."""

    state: dict[str, Tensor]
    lines: list[dict[str, Any]]

    def is_that_of(self, state: dict[str, Tensor], folder: Path) -> None:
        for name, tensor in self.state.items():
            assert torch.equal(state[name], tensor), name
        found = newest_checkpoint(folder)
        assert found is not None
        assert found[1]["progress"]["steps"] == ASKED.steps
        for name, tensor in self.state.items():
            assert torch.equal(found[1]["generator"][name], tensor), name
        assert {path.name for path in folder.iterdir()} == {RUN, METRICS, CHECKPOINT, PREVIOUS}


@pytest.fixture(scope="module")
def whole(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole") / "run"
    made = Whole(run(case, folder), lines(folder))
    assert [line["step"] for line in made.lines] == list(range(ASKED.steps))
    return made


@pytest.mark.parametrize("at", range(6))
def test_a_crashed_run_goes_on_to_the_uninterrupted_result(at: int, case: Case, whole: Whole, tmp_path: Path) -> None:
    crashed(case, tmp_path, at)
    found = newest_checkpoint(tmp_path)
    assert (0 if found is None else found[1]["progress"]["steps"]) == at // 2 * 2  # checkpoint_every is 2
    later = at % 2
    message = f"among its lines are {later} for steps after the checkpoint's {at - later}"
    with warns(message) if later else nullcontext():
        whole.is_that_of(run(case, tmp_path), tmp_path)
    assert lines(tmp_path) == whole.lines


@pytest.mark.parametrize("every", [1, 4, 100])
def test_a_checkpoint_is_written_every_so_many_steps_and_at_the_end(
    every: int, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    save = RunFolder.save

    def counted(self: RunFolder, *given: Any) -> None:
        saved.append(given[-1].steps)
        save(self, *given)

    monkeypatch.setattr(RunFolder, "save", counted)
    run(case, tmp_path, options(checkpoint_every=every))
    assert saved == sorted({*range(every, 7, every), 6})


def test_log_and_checkpoint_are_on_disk_before_the_checkpoint_takes_its_name(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(handle: int) -> None:
        events.append(f"sync {Path(f'/proc/self/fd/{handle}').readlink().name.split('.')[0]}")
        fsync(handle)

    def renamed(self: Path, target: Path) -> Path:
        events.append(f"rename {target.name.split('.')[0]}")
        return replace(self, target)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no system that says what a file handle is of")
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    run(case, tmp_path / "folder", options(steps=1))
    assert events[-4:] == ["sync metrics", "sync checkpoint", "rename checkpoint", "sync folder"]


# Files that are not as they were written


def edited(*pieces: bytes | slice) -> Callable[[bytes], bytes]:
    """An edit that composes a log of slices of its lines and other bytes."""

    def edit(content: bytes) -> bytes:
        old = content.splitlines(keepends=True)
        return b"".join(b"".join(old[piece]) if isinstance(piece, slice) else piece for piece in pieces)

    return edit


HALF = b'{"step": 3, "loss": 0.'
LATER = b'{"step": 4, "loss": 1.0}\n{"step": 5, "loss": 1.0}\n'


@pytest.mark.parametrize(
    ("edit", "steps", "message"),
    [
        (edited(slice(0, 4), LATER), range(6), "2 for steps after the checkpoint's 4, which are computed again$"),
        (edited(slice(0, 1)), [0, 4, 5], "none for 3 steps before the checkpoint$"),
        (edited(), [4, 5], "none for 4 steps before the checkpoint$"),
        (edited(slice(0, 3), HALF), [0, 1, 2, 4, 5], "1 that cannot be read; none for 1 steps before the checkpoint$"),
        (edited(b"\xff\x00garbage\n[1]\n" * 3), [4, 5], "6 that cannot be read; none for 4 steps"),
        (edited(slice(0, 4), b"[" * 100_000), range(6), "1 that cannot be read$"),
        (edited(slice(0, 4), b'{"step": true}\n{"step": 1e3}\n{"loss": 1}\n'), range(6), "3 that cannot be read$"),
        (edited(slice(0, 4), b'{"step": 2, "loss": NaN}\n'), range(6), "1 that cannot be read$"),
        (edited(slice(0, 4), b'{"step": 9, "loss": "1"}\n'), range(6), "1 that cannot be read$"),
        (edited(slice(2, 4), slice(0, 2), slice(0, 4)), range(6), "are some repeated or out of order$"),
        (None, [4, 5], "none for 4 steps before the checkpoint$"),
    ],
)
def test_a_log_that_is_not_the_checkpoints_is_mended_to_it_and_the_steps_are_the_checkpoints(
    edit: Callable[[bytes], bytes] | None,
    steps: list[int],
    message: str,
    case: Case,
    whole: Whole,
    tmp_path: Path,
) -> None:
    crashed(case, tmp_path, 4)
    log = tmp_path / METRICS
    if edit is None:
        log.unlink()
    else:
        log.write_bytes(edit(log.read_bytes()))
    with warns(r"(?<!-)\b" + message):
        whole.is_that_of(run(case, tmp_path), tmp_path)
    assert lines(tmp_path) == [whole.lines[step] for step in steps]


def test_a_log_without_a_checkpoint_is_begun_again(case: Case, whole: Whole, tmp_path: Path) -> None:
    (tmp_path / METRICS).write_bytes(edited(LATER)(b""))
    with warns("among its lines are 2 for steps after the checkpoint's 0, which are computed again"):
        whole.is_that_of(run(case, tmp_path), tmp_path)
    assert lines(tmp_path) == whole.lines


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0x10]) + content[middle + 1 :]


def compressed(content: bytes) -> bytes:
    """The same records, compressed: a few kilobytes could expand to fill the memory."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    return packed.getvalue()


DAMAGE = {
    "a flipped bit": flipped,
    "half": lambda content: content[: len(content) // 2],
    "nothing": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "text": lambda content: b"garbage\n" * 100,
    "compressed": compressed,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_said_and_the_run_goes_on_from_the_one_before(
    damage: str, case: Case, whole: Whole, tmp_path: Path
) -> None:
    crashed(case, tmp_path, 5)
    path = tmp_path / CHECKPOINT
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with warns(f"{CHECKPOINT} is damaged, or not a checkpoint .*; the previous one, after 2 steps, is used"):
        crashed(case, tmp_path, 2)
    for name, steps in ((CHECKPOINT, 4), (PREVIOUS, 2)):  # the damaged one has not replaced the good one
        assert checkpoints.read_checkpoint(tmp_path / name)["progress"]["steps"] == steps
    whole.is_that_of(run(case, tmp_path), tmp_path)
    assert lines(tmp_path) == whole.lines


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_run_without_a_whole_checkpoint_is_refused_and_nothing_is_written(
    damage: str, case: Case, tmp_path: Path
) -> None:
    crashed(case, tmp_path, 4)
    for name in (CHECKPOINT, PREVIOUS):
        (tmp_path / name).write_bytes(DAMAGE[damage]((tmp_path / name).read_bytes()))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"{CHECKPOINT} is damaged, or not a checkpoint of a training run: ") as raised:
        run(case, tmp_path)
    assert "\n" not in str(raised.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("elsewhere")])
def test_a_log_that_is_no_file_of_its_own_is_refused_and_nothing_is_written(
    make: Callable[[Path], Any], case: Case, tmp_path: Path
) -> None:
    make(tmp_path / METRICS)
    with pytest.raises(ValueError, match=f"{METRICS} is not a regular file, expected the log of a run"):
        run(case, tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / METRICS]


def test_every_flipped_bit_of_a_checkpoint_is_found_or_changes_nothing_that_is_read(tmp_path: Path) -> None:
    state: dict[str, Any] = {
        "identity": {"training": {"steps": 3}},
        "progress": dataclasses.asdict(checkpoints.Progress(3, 1)),
        "generator": {"weight": torch.arange(5.0)},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(5)}}, "param_groups": [{"lr": 0.1}]},
        "schedule": {"last_epoch": 3},
    }
    path = tmp_path / CHECKPOINT
    torch.save(state, path)
    content, found = path.read_bytes(), 0
    for position in range(0, len(content), 11):
        spoilt = bytearray(content)
        spoilt[position] ^= 1 << position % 8
        path.write_bytes(spoilt)
        try:
            read = checkpoints.read_checkpoint(path)
        except ValueError:
            found += 1
            continue
        assert torch.equal(read["generator"].pop("weight"), torch.arange(5.0))
        assert torch.equal(read["optimizer"]["state"][0].pop("exp_avg"), torch.ones(5))
        read["generator"]["weight"] = read["optimizer"]["state"][0]["exp_avg"] = None
        expected = repr(state).replace("tensor([0., 1., 2., 3., 4.])", "None")
        assert repr(read) == expected.replace("tensor([1., 1., 1., 1., 1.])", "None")
    assert found > len(content) // 11 // 4


class Payload:
    def __reduce__(self) -> Any:
        return os.mkdir, ("run-by-a-checkpoint",)


def test_a_checkpoint_that_is_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"identity": Payload()}, tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match="is damaged, or not a checkpoint of a training run: Weights only load failed"):
        newest_checkpoint(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"progress": {"steps": -1, "skipped": 0, "skipped_in_a_row": 0}}, "its progress is"),
        ({"progress": {"steps": 1.0}}, "its progress is"),
        ({"progress": {"step": 1}}, "unexpected keyword argument 'step'"),
        ({"generator": []}, "it does not hold identity, progress, generator"),
        ({"identity": None}, "it does not hold identity"),
    ],
)
def test_a_checkpoint_that_holds_something_else_is_refused(
    changes: dict[str, Any], message: str, case: Case, tmp_path: Path
) -> None:
    crashed(case, tmp_path, 2)
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    torch.save({**state, **changes}, tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match=message):
        newest_checkpoint(tmp_path)


# Another run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.5}, r"training\.learning_rate is 0\.001 there and 0\.5 here"),
        ({"losses": {"delta": BOTH["delta"]}}, r"training\.losses\.weights is .* there and nothing here"),
        ({"seed": 1, "clip": 2}, r"training\.clip is 1\.0 there and 2\.0 here; .*training\.seed is 0 there and 1 here"),
    ],
)
def test_a_run_with_other_options_is_refused_and_nothing_is_written(
    changes: dict[str, Any], message: str, case: Case, tmp_path: Path
) -> None:
    crashed(case, tmp_path, 3)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=rf"{CHECKPOINT} was made differently: .*{message}"):
        run(case, tmp_path, dataclasses.replace(ASKED, **changes))
    assert contents(tmp_path) == before


def test_options_that_do_not_matter_to_the_result_may_change(case: Case, whole: Whole, tmp_path: Path) -> None:
    crashed(case, tmp_path, 2)
    whole.is_that_of(run(case, tmp_path, options(checkpoint_every=3, max_skipped_steps=2)), tmp_path)


def test_a_run_on_fewer_teachers_or_of_another_generator_is_refused(case: Case, tmp_path: Path) -> None:
    crashed(case, tmp_path, 3)
    with pytest.raises(ValueError, match="teachers is 5 there and 4 here"):
        case.train(case.generator(), ASKED, tmp_path, case.teachers[:4])
    other = LoRAGenerator(case.format, 6, width=32, depth=1, heads=2).to(case.device)
    differing = r"generator\.mixtures\.0\.weight is \[16, 64\] there and \[16, 32\] here.* and \d+ more"
    with pytest.raises(ValueError, match=differing):
        case.train(other, ASKED, tmp_path)


def test_the_folder_says_what_the_run_depends_on(case: Case, tmp_path: Path) -> None:
    crashed(case, tmp_path, 3)
    facts = json.loads((tmp_path / RUN).read_text())["identity"]
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert facts == found[1]["identity"]
    assert facts["training"]["losses"]["delta"]["weight"] == 1.0
    assert len(facts["labels"]["model_sha256"]) == 64


# Other jobs at the same time, and what they leave


def test_a_folder_that_another_job_holds_is_refused_and_nothing_is_written(case: Case, tmp_path: Path) -> None:
    crashed(case, tmp_path, 3)
    with RunFolder.held(tmp_path / "other", Identity({})):
        run(case, tmp_path / "third", options(steps=1))  # another folder is free
    with RunFolder.held(tmp_path / "held", Identity({})):
        before = contents(tmp_path / "held")
        with pytest.raises(ValueError, match=rf"held is in use by another job, process {os.getpid()} on"):
            run(case, tmp_path / "held")
        assert contents(tmp_path / "held") == before


def test_what_killed_runs_have_left_half_written_is_cleared(case: Case, whole: Whole, tmp_path: Path) -> None:
    crashed(case, tmp_path, 2)
    (tmp_path / f"{CHECKPOINT}.12345{UNFINISHED}").write_bytes(b"half")
    (tmp_path / f"{RUN}.77{UNFINISHED}").write_bytes(b"")
    whole.is_that_of(run(case, tmp_path), tmp_path)


# Ctrl-C and SIGTERM


@pytest.fixture
def sigterm_as_by_the_command_line() -> Iterator[None]:
    def terminate(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    yield
    assert signal.signal(signal.SIGTERM, before) is terminate  # as before the training


@pytest.mark.usefixtures("sigterm_as_by_the_command_line")
@pytest.mark.parametrize("at", [0, 5])
@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)], ids=str
)
def test_a_signal_ends_the_run_after_its_step_with_the_state_saved(
    number: signal.Signals, kind: type[BaseException], at: int, case: Case, whole: Whole, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt) as raised:
        run(case, tmp_path, options(checkpoint_every=100), at, lambda: os.kill(os.getpid(), number))
    assert type(raised.value) is kind
    assert f"{at + 1} of 6 steps are done; {tmp_path} holds them" in str(raised.value.__notes__)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found[1]["progress"]["steps"] == at + 1
    assert len(lines(tmp_path)) == at + 1
    state = run(case, tmp_path, options(checkpoint_every=1))
    for name, tensor in whole.state.items():
        assert torch.equal(state[name], tensor), name
    assert lines(tmp_path) == whole.lines


def test_a_second_signal_two_seconds_later_does_not_wait(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # as under torchrun
        monkeypatch.setattr("lora_delta.generate.interrupts._SECONDS", -1.0)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the third one waited")

    with pytest.raises(KeyboardInterrupt):
        run(case, tmp_path, ASKED, 3, twice)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found[1]["progress"]["steps"] == 2


def test_a_signal_that_python_does_not_handle_is_left_as_it_is(case: Case, tmp_path: Path) -> None:
    seen = []
    before = signal.getsignal(signal.SIGTERM)
    assert before is signal.SIG_DFL
    run(case, tmp_path, options(steps=1), 0, lambda: seen.append(signal.getsignal(signal.SIGTERM)))
    assert seen == [signal.SIG_DFL]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# Devices


@pytest.fixture
def tagged_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved tensors are tagged as made on a GPU that this machine may lack."""
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:99")


@pytest.mark.usefixtures("tagged_as_on_a_gpu")
def test_a_checkpoint_made_on_a_gpu_resumes_anywhere(case: Case, whole: Whole, tmp_path: Path) -> None:
    crashed(case, tmp_path, 4)
    with pytest.raises(RuntimeError, match="CUDA device"):
        torch.load(tmp_path / CHECKPOINT, weights_only=True)  # else this test would show nothing
    whole.is_that_of(run(case, tmp_path), tmp_path)


@pytest.mark.skipif("cuda" not in DEVICES, reason="there is no GPU")
@pytest.mark.parametrize("places", [("cuda", "cpu"), ("cpu", "cuda")], ids=str)
def test_a_run_goes_on_on_another_device(places: tuple[str, str], tmp_path: Path) -> None:
    first, second = (training_case(place) for place in places)
    run(first, tmp_path / "whole", kind=LoRAGenerator)
    with pytest.raises(Crash):
        run(first, tmp_path / "cut", at=4, kind=LoRAGenerator)
    run(second, tmp_path / "cut", kind=LoRAGenerator)
    for one, other in zip(lines(tmp_path / "cut"), lines(tmp_path / "whole"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-2), one["step"]
        assert math.isfinite(one["gradient_norm"])


def warns(message: str) -> Any:
    return pytest.warns(UserWarning, match=message)
