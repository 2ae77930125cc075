"""The suites of the torch backend once more, with a backend of kernels in its place.

Where there is no GPU Triton's interpreter runs its kernels, in about a second for each case, and `emulated`
those of cuda, in about a tenth. So of each test some cases, evenly spread, are part of `make test`, and all
of them of `make test-all` (`conftest.py`). On a GPU, FUSED_ALIGN_TEST_DEVICE=cuda puts the tensors there.
"""

from __future__ import annotations

from types import FunctionType, ModuleType

import kernels
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

#: how many cases of each test of a module `make test` runs with triton; with cuda MORE times as many
MORE = 3
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
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.use(request.node.name.split("_")[1], monkeypatch)


def _copied(test: FunctionType, most: int) -> FunctionType:
    """The test as a function of its own, so that marks do not reach the original."""
    copy = FunctionType(test.__code__, test.__globals__, test.__name__, test.__defaults__, test.__closure__)
    copy.__kwdefaults__ = test.__kwdefaults__
    copy.__dict__.update(test.__dict__)
    return pytest.mark.share(most)(copy)


def _wanted(name: str, value: object) -> bool:
    here = torch.get_default_device().type == "cpu" or not any(word in name for word in ON_CPU)
    return name.startswith("test_") and isinstance(value, FunctionType) and name not in ELSEWHERE and here


for _backend_name in kernels.BACKENDS:
    for _module, _most in SHARE.items():
        for _name, _test in list(vars(_module).items()):
            if not _wanted(_name, _test):
                continue
            _stem, _own = _module.__name__.removeprefix("test_"), _name.removeprefix("test_")
            _share = 0 if any(word in _name for word in LONG) else _most
            _share *= MORE if _backend_name == "cuda" else 1
            globals()[f"test_{_backend_name}_{_stem}_{_own}"] = _copied(_test, _share)
