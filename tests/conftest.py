"""Options that say which backends of the kernels a run tests.

One process tests one way of running the kernels. `make test` starts one for each: as they run
here, Triton in its interpreter (TRITON_INTERPRET=1), and the CUDA sources executed on the CPU
(--native-library).
"""

import os
from pathlib import Path

# Before anything imports huggingface_hub, which reads it then: no test may reach for a network.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    parser.addoption(
        "--places",
        default="",
        help="test the kernels on these places alone, and fail where one is not there: "
        "device-backend, separated by commas, such as cpu-native,cpu-reference",
    )
    parser.addoption(
        "--native-library",
        type=Path,
        help="load this library in place of the installed one: the CUDA sources, built to run on "
        "the CPU (make test-cuda-on-cpu)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Put the named library in the place of the installed one, before anything loads that."""
    library = config.getoption("--native-library")
    if library is None:
        return
    from fedspa_kernels import native

    if not library.is_file():
        raise pytest.UsageError(f"--native-library {library} is no file; build it first")
    native.LIBRARY = library.resolve()
    record = {"built": ["cpu"], "why_not": "CUDA runs on the CPU here", "torch": torch.__version__}
    native._record = lambda: record


@pytest.fixture
def single_thread():
    """PyTorch with one thread, as long as a test takes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
