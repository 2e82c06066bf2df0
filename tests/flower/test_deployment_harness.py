"""What the tests of this folder rest on: nothing outlives a test unseen, bytes are counted."""

import socket
import sys
import threading

import pytest
from counting import CountingProxy
from parties import Parties
from processes import wait_for

# A child in a session of its own that a Ctrl-C does not reach, as a SuperLink's SuperExec is.
STUBBORN = """
import subprocess, sys, time
sleep = "import time; print('sleeping', flush=True); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", sleep], start_new_session=True)
time.sleep(600)
"""


def test_what_outlives_the_end_is_found_and_killed(tmp_path):
    parties = Parties(tmp_path)
    parties.start("node-0", [sys.executable, "-c", STUBBORN])
    parties.wait_for_text("node-0", "sleeping")
    [left] = parties.end(patience=5)
    assert left.party == str(tmp_path / "node-0") and "sleeping" in left.command[-1]
    assert parties.processes() == []


def test_a_killed_party_takes_its_children_with_it(tmp_path):
    parties = Parties(tmp_path)
    for party in ("node-0", "node-1"):
        parties.start(party, [sys.executable, "-c", STUBBORN])
        parties.wait_for_text(party, "sleeping")
    assert parties.kill("node-0") == 2
    assert parties.processes("node-0") == [] and len(parties.processes("node-1")) == 2
    assert parties.kill("node-1") == 2
    assert parties.end() == []


def test_a_log_that_never_says_so_ends_the_wait():
    with pytest.raises(TimeoutError, match="rain did not happen within 0.1 s"):
        wait_for(lambda: False, "rain", 0.1)


def test_the_proxy_counts_both_directions():
    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            while connection.recv(1 << 16):
                pass
            connection.sendall(bytes(2_000_000))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, daemon=True).start()
        with CountingProxy(listener.getsockname()[1]) as proxy:
            with socket.create_connection(("127.0.0.1", proxy.port)) as client:
                client.sendall(bytes(5_000_000))
                client.shutdown(socket.SHUT_WR)
                back = sum(iter(lambda: len(client.recv(1 << 16)), 0))
    assert (proxy.sent, proxy.received, back) == (5_000_000, 2_000_000, 2_000_000)
