"""Every test of an operator runs on every backend of it that is here, on every device."""

from typing import NamedTuple

import pytest
import torch

from fedspa_kernels import dispatch


class Place(NamedTuple):
    """Where a test runs its operator."""

    device: str
    backend: str


def places(*operators: str) -> list[Place]:
    """All devices and backends that can run all of these operators."""
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    return [
        Place(device, backend)
        for device in devices
        for backend in dispatch.available(operators[0], device)
        if all(backend in dispatch.available(operator, device) for operator in operators)
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Fill `place` from the operators that the test's module names in OPERATORS."""
    if "place" in metafunc.fixturenames:
        here = places(*metafunc.module.OPERATORS)
        metafunc.parametrize("place", here, ids=[f"{p.device}-{p.backend}" for p in here])


@pytest.fixture(autouse=True)
def no_backend_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own FEDSPA_BACKEND must not decide what is tested."""
    monkeypatch.delenv("FEDSPA_BACKEND", raising=False)
