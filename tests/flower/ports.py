"""Free ports of the loopback interface, each given out once at a time on this machine."""

import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager

# Below the ports that Linux gives to outgoing connections (32768 and above): no connection of
# another process can take one between our check and the server's bind.
CANDIDATES = range(20_000, 30_000)


@contextmanager
def free_ports(count: int) -> Iterator[list[int]]:
    """Ports that nobody listens on, and that no other test gets while this context is open.

    The claim is an abstract Unix socket named by the port: the kernel drops it with its process.
    """
    claims: list[socket.socket] = []
    ports: list[int] = []
    try:
        for port in random.sample(CANDIDATES, len(CANDIDATES)):
            if len(ports) == count:
                break
            claim = socket.socket(socket.AF_UNIX)
            claims.append(claim)
            try:
                claim.bind(f"\0fedspa-test-port-{port}")
                with socket.socket() as listener:
                    listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            ports.append(port)
        if len(ports) < count:
            raise RuntimeError(f"only {len(ports)} of {count} ports are free in {CANDIDATES}")
        yield ports
    finally:
        for claim in claims:
            claim.close()
