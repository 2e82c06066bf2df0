"""Fixtures of the federation's tests."""

import os

# Before transformers is imported: no test may reach for a network.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from small_models import ARCHITECTURES


@pytest.fixture(params=ARCHITECTURES)
def architecture(request) -> str:
    """Each architecture in turn."""
    return request.param
