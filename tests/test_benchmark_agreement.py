"""Two contenders agree when their relative errors are tolerable, and in no other case."""

from __future__ import annotations

import math
from pathlib import Path

import agreement
import pytest
import torch
from agreement import TOLERANCE, DisagreementError, Errors, compare, require
from bench import K_PROJ_A, results
from safetensors.torch import save_file


def test_agreement_is_the_relative_frobenius_error(tmp_path: Path) -> None:
    reference, other = results(), results()
    other["value"] *= 1.01
    other[K_PROJ_A] *= -1
    save_file(reference, tmp_path / "reference")
    save_file(other, tmp_path / "other")
    errors = compare(str(tmp_path / "other"), str(tmp_path / "reference"))
    assert errors.value == pytest.approx(0.01, rel=1e-4)
    assert (errors.worst, errors.worst_name) == (pytest.approx(2.0), K_PROJ_A)
    assert errors.gradient < 0.01
    assert errors.adapters == 2


def test_only_the_adapters_that_both_have_are_compared(tmp_path: Path) -> None:
    save_file(results(), tmp_path / "reference")
    save_file({name: t[:1].contiguous() for name, t in results().items()}, tmp_path / "other")
    errors = compare(str(tmp_path / "other"), str(tmp_path / "reference"))
    assert errors == Errors(0.0, 0.0, 0.0, errors.worst_name, 1)


def test_agreement_takes_every_gradient_and_no_nan(tmp_path: Path) -> None:
    other = results()
    save_file(other, tmp_path / "reference")
    other[K_PROJ_A][0, 0, 0] = float("nan")
    save_file(other, tmp_path / "other")
    errors = compare(str(tmp_path / "other"), str(tmp_path / "reference"))
    with pytest.raises(DisagreementError, match=r"k_proj\.lora_A"):
        require("other", errors, TOLERANCE[torch.float32])
    del other[K_PROJ_A]
    save_file(other, tmp_path / "other")
    with pytest.raises(DisagreementError, match=r"only one of the two has .*k_proj\.lora_A"):
        compare(str(tmp_path / "other"), str(tmp_path / "reference"))


def test_agreement_takes_the_same_shapes(tmp_path: Path) -> None:
    save_file(results(), tmp_path / "reference")
    save_file({name: t[..., :3].contiguous() for name, t in results().items()}, tmp_path / "other")
    with pytest.raises(DisagreementError, match=r"has shape \(2, 4, 3\), expected \(2, 4, 64\)"):
        compare(str(tmp_path / "other"), str(tmp_path / "reference"))


@pytest.mark.parametrize(
    ("error", "reference", "relative"), [(0, 0, 0), (0, 2, 0), (1, 2, 0.5), (1, 0, math.inf), (math.nan, 1, math.inf)]
)
def test_an_error_without_reference_is_infinite_and_none_is_zero(
    error: float, reference: float, relative: float
) -> None:
    assert agreement.relative_error(error, reference) == relative


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_tolerate_rounding_but_no_lost_scale(dtype: torch.dtype, tmp_path: Path) -> None:
    reference, tolerance = results(), TOLERANCE[dtype]
    save_file(reference, tmp_path / "reference")
    save_file({name: t.to(dtype).float() for name, t in reference.items()}, tmp_path / "rounded")
    require("rounded", compare(str(tmp_path / "rounded"), str(tmp_path / "reference")), tolerance)
    reference[K_PROJ_A] *= 2
    save_file(reference, tmp_path / "scaled twice")
    errors = compare(str(tmp_path / "scaled twice"), str(tmp_path / "reference"))
    with pytest.raises(DisagreementError, match=r"k_proj\.lora_A"):
        require("scaled twice", errors, tolerance)


def test_what_is_tolerated_follows_the_noise_of_hooks_and_no_more() -> None:
    tolerance = TOLERANCE[torch.bfloat16].widened(Errors(0.05, 0.01, 0.8, K_PROJ_A, 2))
    assert tolerance == Errors(0.1, 0.1, 1.6)
    require("a way", Errors(0.09, 0.09, 1.5, K_PROJ_A, 2), tolerance)
    for errors in ((0.11, 0.09, 1.5), (0.09, 0.11, 1.5), (0.09, 0.09, 1.7)):
        with pytest.raises(DisagreementError):
            require("a way", Errors(*errors, K_PROJ_A, 2), tolerance)
