"""What `python -m fedspa.flower` finds before a run is begun."""

import ssl
import subprocess
import sys
import threading

import pytest
from certificates import expired, make_certificates

from fedspa.flower.beforehand import APP, check_connection, check_run_config

RIGHT = 'model="m" out="o" clients=2 sparsity=0.5'


def test_the_app_is_named_once_everything_is_right(tmp_path):
    run = tmp_path / "run.toml"
    run.write_text(RIGHT.replace(" ", "\n"))
    done = subprocess.run(
        [sys.executable, "-m", "fedspa.flower", str(run)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{APP}\n", "")
    assert (APP / "pyproject.toml").is_file()
    run.write_text(run.read_text() + "\nsparsty=0.5")
    done = subprocess.run(
        [sys.executable, "-m", "fedspa.flower", str(run)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip() == (
        "fedspa: run-config has the unknown key 'sparsty'; did you mean 'sparsity'?"
    )


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ((f"{RIGHT} pattern='2:4'",), "exactly one"),
        (('out="o"', "clients=2"), "run-config has no model"),
        (("nowhere.toml",), "nowhere.toml cannot be read: No such file"),
        (("clients=",), "run-config"),
        ((f"{RIGHT} colour='red'",), "unknown key 'colour'"),
    ],
)
def test_a_run_config_that_cannot_be_is_told(given, match):
    with pytest.raises(ValueError, match=match):
        check_run_config(given)
    check_run_config((RIGHT,))
    check_run_config(tuple(RIGHT.split()))


def listen(certificate=None, key=None):
    """A port that takes one connection, with TLS where there is a certificate."""
    import socket

    server = socket.create_server(("127.0.0.1", 0))

    def answer():
        try:
            connection, _ = server.accept()
            if certificate is None:
                connection.close()
                return
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(certificate, key)
            context.wrap_socket(connection, server_side=True).close()
        except OSError:
            # The other side may not trust this one, which is what some tests are about.
            pass

    threading.Thread(target=answer, daemon=True).start()
    return server.getsockname()[1]


def connect(home, monkeypatch, address, entry="insecure = true"):
    home.mkdir(exist_ok=True)
    text = f'[superlink]\ndefault = "x"\n[superlink.x]\naddress = "{address}"\n{entry}\n'
    home.joinpath("config.toml").write_text(text)
    monkeypatch.setenv("FLWR_HOME", str(home))
    check_connection("x")


def test_a_superlink_that_answers_is_good(tmp_path, monkeypatch):
    connect(tmp_path, monkeypatch, f"127.0.0.1:{listen()}")
    good = make_certificates(tmp_path / "good")
    port = listen(good.server, good.server_key)
    connect(tmp_path, monkeypatch, f"127.0.0.1:{port}", f'root-certificates = "{good.authority}"')


def test_a_superlink_that_is_not_there_is_told(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="127.0.0.1:1 cannot be reached .*refused.*start it"):
        connect(tmp_path, monkeypatch, "127.0.0.1:1")
    with pytest.raises(ValueError, match="'nowhere' of 'x' is not HOST:PORT"):
        connect(tmp_path, monkeypatch, "nowhere")
    with pytest.raises(ValueError, match="has no connection 'y'.*x"):
        check_connection("y")


def test_certificates_that_are_not_good_are_told(tmp_path, monkeypatch):
    good, other = make_certificates(tmp_path / "good"), make_certificates(tmp_path / "other")
    trusted = f'root-certificates = "{good.authority}"'
    port = listen(other.server, other.server_key)
    with pytest.raises(RuntimeError, match="is not good .*issuer.*root-certificates"):
        connect(tmp_path, monkeypatch, f"127.0.0.1:{port}", trusted)
    old = expired(good)
    port = listen(old.server, old.server_key)
    with pytest.raises(RuntimeError, match="is not good .*expired.*renew"):
        connect(tmp_path, monkeypatch, f"127.0.0.1:{port}", trusted)
    with pytest.raises(RuntimeError, match="does not speak TLS|cannot be reached"):
        connect(tmp_path, monkeypatch, f"127.0.0.1:{listen()}", trusted)
    with pytest.raises(ValueError, match="root-certificates .*gone.pem cannot be read"):
        connect(tmp_path, monkeypatch, f"127.0.0.1:{listen()}", 'root-certificates = "gone.pem"')
