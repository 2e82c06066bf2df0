"""Every test of an operator runs on every backend of it that is here, on every device."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from fedspa_kernels import dispatch


class Place(NamedTuple):
    """Where a test runs its operator."""

    device: str
    backend: str

    @property
    def name(self) -> str:
        """How the option --places and the tests' ids call it."""
        return f"{self.device}-{self.backend}"


def places(wanted: str, *operators: str) -> list[Place]:
    """All devices and backends that can run all of these operators, or those of them wanted."""
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    here = [
        Place(device, backend)
        for device in devices
        for backend in dispatch.available(operators[0], device)
        if all(backend in dispatch.available(operator, device) for operator in operators)
    ]
    if not wanted:
        return here
    missing = set(wanted.split(",")) - {place.name for place in here}
    if missing:
        raise pytest.UsageError(f"--places: {operators[0]} has no {', '.join(sorted(missing))}")
    return [place for place in here if place.name in wanted.split(",")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Fill `place` from the operators that the test's module names in OPERATORS."""
    if "place" in metafunc.fixturenames:
        wanted = metafunc.config.getoption("--places")
        here = places(wanted, *metafunc.module.OPERATORS)
        metafunc.parametrize("place", here, ids=[place.name for place in here])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take out what does not exist, float64 on a kernel; and mark what runs on a GPU."""

    def exists(item: pytest.Item) -> bool:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        place = values.get("place", values.get("exact_place"))
        # Other tests have parameters of that name too.
        if not isinstance(place, Place) or place.backend == "reference":
            return True
        if getattr(item.module, "FLOAT64_IS_FOR_ALL", False):
            return True
        return torch.float64 not in values.values() and "exact_place" not in item.fixturenames

    gone = [item for item in items if not exists(item)]
    config.hook.pytest_deselected(items=gone)
    items[:] = [item for item in items if exists(item)]
    for item in items:
        place = getattr(item, "callspec", None) and item.callspec.params.get("place")
        if isinstance(place, Place) and place.device == "cuda":
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def no_backend_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own FEDSPA_BACKEND must not decide what is tested."""
    monkeypatch.delenv("FEDSPA_BACKEND", raising=False)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill every new tensor with NaN or the largest integer, so that what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
