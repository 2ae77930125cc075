from __future__ import annotations

import os

import pytest
import torch

# Everything a test makes without naming a device is made there.
if "FUSED_ALIGN_TEST_DEVICE" in os.environ:
    torch.set_default_device(os.environ["FUSED_ALIGN_TEST_DEVICE"])

if not torch.cuda.is_available():  # kernels then run in Python; Triton looks when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import settings

from fused_align.backends import KERNELS

settings.register_profile(
    "fused_align", deadline=None, max_examples=25, derandomize=bool(os.environ.get("CI")), database=None
)
settings.load_profile("fused_align")

if "PYTEST_XDIST_WORKER" in os.environ:  # one worker per core: threads would only get in each other's way
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked share(n), n cases evenly spread stay; the others are slow."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("share"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for group in cases.values():
        most = group[0].get_closest_marker("share").args[0]  # type: ignore[union-attr]
        kept = {len(group) * place // most for place in range(most)}
        for place, item in enumerate(group):
            if place not in kept:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(params=KERNELS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend of kernels in turn, on the module's DEVICE, else where tensors are made by default."""
    import kernels

    kernels.use(request.param, monkeypatch, getattr(request.module, "DEVICE", None))
    return request.param


@pytest.fixture
def tiny_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 3 rows and 4 columns, so that problems small enough for differences have many of them."""
    from fused_align.linear import plan

    monkeypatch.setattr(plan, "MIN_ROWS", 3)
    monkeypatch.setattr(plan, "MIN_COLS", 4)
    monkeypatch.setattr(plan, "MIN_CHUNK", 3)
    monkeypatch.setattr(plan, "TILE_BYTES", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(plan, "MAX_ROWS", {"cpu": 3, "cuda": 3})
