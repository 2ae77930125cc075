"""The suites of the torch backend once more, with the triton backend in its place.

Where there is no GPU Triton's interpreter runs the kernels, in about a second for each case. So of each test
a few cases, evenly spread, are part of `make test`, and all of them of `make test-all` (`conftest.py`).
On a GPU, FUSED_ALIGN_TEST_DEVICE=cuda puts the tensors there.
"""

from __future__ import annotations

from types import FunctionType, ModuleType

import pytest
import test_compile
import test_corners
import test_extreme
import test_losses
import test_main_grad
import test_max_live
import test_plans
import test_properties
import test_skipping
import test_stats_losses
import test_waist
import torch
from test_compile import fresh_compiler  # noqa: F401  a fixture

pytest.importorskip("triton", reason="triton is not installed")

#: how many cases of each test of a module `make test` runs
SHARE: dict[ModuleType, int] = {
    test_waist: 4,
    test_plans: 4,
    test_skipping: 2,
    test_max_live: 2,
    test_main_grad: 2,
    test_losses: 1,
    test_stats_losses: 2,
    test_corners: 1,
    test_compile: 2,
    test_extreme: 1,
    test_properties: 0,
}
#: none of these: dozens to hundreds of calls each
LONG = ("gradcheck", "plans_agree", "small_budget_means", "a_window_that", "gradients_are_the_callers")
#: tests that ask for the torch backend by name, count its operations, run on the meta device, or define
#: losses by a fixture that another module has too
ELSEWHERE = {
    "test_logp_entropy_lse", "test_gemm_passes", "test_statistics_read_nothing_back",
    "test_align_loss_reads_nothing_back", "test_a_loss_of_ones_own", "test_items_of_the_wrong_number",
    "test_a_statistic_that_was_not_named", "test_logits_with_temperatures_compile_into_one_graph",
}  # fmt: skip


#: what a CPU alone can do: look at data before it starts, and have budgets of a known size
ON_CPU = (
    "out_of_range", "too_few", "a_promise_kept", "nothing_is_added", "are_checked", "no_pair_fits",
    "an_error_asks_for", "the_environment_sets",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_ALIGN_BACKEND", "triton")


def _copied(test: FunctionType, most: int) -> FunctionType:
    """The test as a function of its own, so that marks do not reach the original."""
    copy = FunctionType(test.__code__, test.__globals__, test.__name__, test.__defaults__, test.__closure__)
    copy.__kwdefaults__ = test.__kwdefaults__
    copy.__dict__.update(test.__dict__)
    return pytest.mark.share(most)(copy)


def _wanted(name: str, value: object) -> bool:
    here = torch.get_default_device().type == "cpu" or not any(word in name for word in ON_CPU)
    return name.startswith("test_") and isinstance(value, FunctionType) and name not in ELSEWHERE and here


for _module, _most in SHARE.items():
    for _name, _test in list(vars(_module).items()):
        if _wanted(_name, _test):
            _stem = _module.__name__.removeprefix("test_")
            globals()[f"test_{_stem}_{_name.removeprefix('test_')}"] = _copied(
                _test, 0 if any(word in _name for word in LONG) else _most
            )
