"""pytest-benchmark over the providers at a small size: `make bench`."""

from __future__ import annotations

from typing import Any

import pytest

from . import measure, reference
from .cases import MODES, Case, make_inputs, without_reference

pytest.importorskip("pytest_benchmark", reason="benchmarks need pytest-benchmark; pip install '.[bench]'")

ALL = {provider.name: provider for provider in measure.providers("cpu")}


def served() -> list[tuple[Case, str]]:
    """Every mode with the providers that serve it."""
    cases = [Case("small", 256, 64, 4096, "float32", "randn", mode) for mode in MODES]
    return [(case, name) for case in cases for name in ALL if ALL[name].supports(case, "cpu") is None]


@pytest.mark.filterwarnings("ignore")  # warnings of other libraries are theirs
@pytest.mark.parametrize(("case", "name"), served(), ids=lambda value: getattr(value, "mode", value))
def test_speed(case: Case, name: str, benchmark: Any) -> None:
    provider = ALL[name]
    reason = provider.why_not("cpu")
    if reason:
        pytest.skip(reason)
    inputs = make_inputs(case, "cpu")
    if provider.without_reference(case):
        inputs = without_reference(inputs)
    call = provider.build(case, inputs)
    errors = measure.errors(case, inputs, reference.truth(case, inputs), call())
    # no speed is reported for wrong results; sums of raw log-probs lose more digits, see test_tools
    assert measure.beyond(errors, dict.fromkeys(errors, 1e-4)) is None
    benchmark.group = case.mode
    benchmark.extra_info.update(errors)
    benchmark.pedantic(call, rounds=10, warmup_rounds=1)
