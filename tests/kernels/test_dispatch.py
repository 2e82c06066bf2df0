import os
import subprocess
import sys

import pytest
import torch

from fedspa_kernels import __main__, dispatch, native, pack_mask, smallest_mask, wanda_scores

SCORES = torch.tensor([[3.0, 1.0, 2.0]])


def run_python(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture
def nothing_built(monkeypatch):
    """As if the package had been installed without a compiler."""
    native.why_not_on.cache_clear()
    monkeypatch.setattr(native, "load", lambda: False)
    monkeypatch.setattr(native, "built", tuple)
    monkeypatch.setattr(native, "why_not", lambda: "no C++ compiler was found")
    yield
    native.why_not_on.cache_clear()


@pytest.fixture
def two_backends(monkeypatch):
    """An operator that says which backend ran it."""
    backends = {
        "reference": dispatch.Backend(lambda *_: "reference"),
        "native": dispatch.Backend(
            lambda *_: "native", ("cpu",), lambda *numbers: "it is odd" if sum(numbers) % 2 else ""
        ),
    }
    monkeypatch.setitem(dispatch._BACKENDS, "either", backends)
    monkeypatch.setattr(native, "why_not_on", lambda device: "" if device.type == "cpu" else "")
    return lambda *arguments, backend=None: dispatch.run(
        "either", torch.device("cpu"), backend, *arguments
    )


def test_the_preferred_backend_runs_without_a_choice(two_backends):
    assert two_backends() == "native"
    assert dispatch.available("either", "cpu") == ("native", "reference")
    assert dispatch.available("either", "cuda") == ("reference",)
    assert dispatch.available("either", "xpu") == ("reference",)


def test_the_environment_is_read_at_each_call_and_an_argument_overrides_it(
    two_backends, monkeypatch
):
    monkeypatch.setenv("FEDSPA_BACKEND", "reference")
    assert two_backends() == "reference"
    assert two_backends(backend="native") == "native"
    monkeypatch.setenv("FEDSPA_BACKEND", "")
    assert two_backends() == "native"


def test_what_a_backend_refuses_goes_to_the_next_unless_it_was_asked_for(two_backends):
    assert two_backends(2) == "native"
    assert two_backends(3) == "reference"
    with pytest.raises(RuntimeError, match="either: the native backend cannot run .* it is odd"):
        two_backends(3, backend="native")


def test_float64_goes_to_the_reference_and_is_never_narrowed():
    scores = SCORES.double() * 1e200
    assert smallest_mask(scores, 1).tolist() == [[False, True, False]]
    for backend in set(dispatch.available("smallest_mask", "cpu")) - {"reference"}:
        sentence = f"the {backend} backend cannot run .* a tensor is float64"
        with pytest.raises(RuntimeError, match=sentence):
            smallest_mask(scores, 1, backend=backend)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton is interpreted here")
def test_a_backend_that_is_not_there_is_an_error_never_a_fallback(monkeypatch):
    sentence = "smallest_mask: no triton backend.* for cpu tensors, Triton runs on a GPU"
    with pytest.raises(RuntimeError, match=sentence):
        smallest_mask(SCORES, 1, backend="triton")
    monkeypatch.setenv("FEDSPA_BACKEND", "triton")
    with pytest.raises(RuntimeError, match=sentence):
        smallest_mask(SCORES, 1)


def test_a_backend_that_is_not_built_says_why_and_how_to_build_it(nothing_built):
    mask = torch.ones(3, dtype=torch.bool)
    sentence = r"pack_mask: no native .* not built: no C\+\+ compiler was found; .*pip install"
    with pytest.raises(RuntimeError, match=sentence):
        pack_mask(mask, backend="native")
    assert pack_mask(mask).tolist() == [7]


def test_an_old_gpu_is_named_with_its_compute_capability(monkeypatch):
    class OldGpu:
        name, major, minor = "Tesla V100", 7, 0

    class NewGpu:
        name, major, minor = "NVIDIA H200", 9, 0

    native.why_not_on.cache_clear()
    monkeypatch.setattr(native, "load", lambda: True)
    monkeypatch.setattr(native, "built", lambda: ("cpu", "cuda"))
    monkeypatch.setattr(native, "_record", lambda: {"oldest_gpu": [8, 0]})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(native, "_why_no_launch", lambda gpu: "")
    # Beside a new one, which the library goes on to serve.
    gpus = {torch.device("cuda", 0): OldGpu, torch.device("cuda", 1): NewGpu}
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.get)
    reasons = [native.why_not_on(gpu) for gpu in gpus]
    native.why_not_on.cache_clear()
    assert reasons == [
        "Tesla V100 has compute capability 7.0 and the library has code for 8.0 and newer",
        "",
    ]


def test_an_unknown_backend_is_an_error(monkeypatch):
    sentence = "backend 'cutlass' is not known; choose from native, triton, reference"
    with pytest.raises(ValueError, match=f"^smallest_mask: {sentence}"):
        smallest_mask(SCORES, 1, backend="cutlass")
    monkeypatch.setenv("FEDSPA_BACKEND", "cutlass")
    sentence = r"backend 'cutlass' \(from the variable FEDSPA_BACKEND\) is not known"
    with pytest.raises(ValueError, match=f"^smallest_mask: {sentence}"):
        smallest_mask(SCORES, 1)


def test_a_library_that_does_not_load_stops_only_who_asks_for_it(monkeypatch):
    def fail():
        raise RuntimeError("fedspa_kernels: built with torch 2.99.0 and does not load")

    native.why_not_on.cache_clear()
    monkeypatch.setattr(native, "load", fail)
    assert smallest_mask(SCORES, 1, backend="reference").tolist() == [[False, True, False]]
    with pytest.raises(RuntimeError, match="does not load"):
        smallest_mask(SCORES, 1)
    monkeypatch.setattr(sys, "argv", ["fedspa_kernels", "--brief"])
    with pytest.raises(SystemExit, match="does not load"):
        __main__.main()
    native.why_not_on.cache_clear()


def test_the_table_follows_the_environment(monkeypatch):
    monkeypatch.setenv("FEDSPA_BACKEND", "reference")
    assert "[reference]" in __main__.table() and "[native]" not in __main__.table()


def test_tensors_on_different_devices_are_an_error():
    sentence = "wanda_scores: weight on cpu, norms on meta; move them to one device"
    with pytest.raises(ValueError, match=sentence):
        torch.ops.fedspa.wanda_scores.default(torch.ones(2, 3), torch.ones(3, device="meta"))
    with pytest.raises(ValueError, match=sentence):
        wanda_scores(torch.ones(2, 3), torch.ones(3, device="meta"))


def test_importing_the_kernels_imports_neither_fedspa_nor_triton_nor_numpy_of_its_own():
    script = (
        "import sys, torch; before = set(sys.modules); import fedspa_kernels;"
        "new = set(sys.modules) - before; print(sorted({n.split('.')[0] for n in new}))"
    )
    new = run_python("-c", script)
    assert "'fedspa_kernels'" in new
    for other in ("'fedspa'", "'triton'", "'numpy'"):
        assert other not in new


def test_the_command_prints_every_operator_and_a_brief_line():
    printed = run_python("-m", "fedspa_kernels")
    for operator in dispatch.operators():
        assert operator in printed
    brief = run_python("-m", "fedspa_kernels", "--brief")
    assert brief.startswith("backends built: reference (PyTorch)") and brief.count("\n") == 1
    assert brief in printed


def test_the_brief_line_says_what_is_missing_and_why(monkeypatch):
    monkeypatch.setattr(native, "load", lambda: True)
    monkeypatch.setattr(native, "built", lambda: ("cpu",))
    monkeypatch.setattr(native, "why_not", lambda: "nvcc not found")
    assert __main__.brief() == (
        "backends built: reference (PyTorch), native CPU (C++); no CUDA: nvcc not found"
    )
