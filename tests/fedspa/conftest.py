"""Fixtures of the federation's tests."""

import pytest
import torch
from small_models import ARCHITECTURES


@pytest.fixture(params=ARCHITECTURES)
def architecture(request) -> str:
    """Each architecture in turn."""
    return request.param


@pytest.fixture(autouse=True)
def one_thread():
    """Small models gain nothing from a second thread, and wait for it where cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
