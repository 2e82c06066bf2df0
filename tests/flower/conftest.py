import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """As in the network's processes: products are cut, and added up, by the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
