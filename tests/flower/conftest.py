import signal

import pytest

# A shell's background job, such as `make test` starts, is born deaf to Ctrl-C, and so are its
# children: they would not end when a test ends them.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def one_thread(single_thread):
    """As in the network's processes: products are cut, and added up, by the number of threads."""
