"""Fixtures of the federation's tests."""

import pytest
from small_models import ARCHITECTURES


@pytest.fixture(params=ARCHITECTURES)
def architecture(request) -> str:
    """Each architecture in turn."""
    return request.param


@pytest.fixture(autouse=True)
def one_thread(single_thread):
    """Small models gain nothing from a second thread, and wait for it where cores are busy."""
