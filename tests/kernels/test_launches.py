"""What a Triton launch is described as, for the table of resources, is what the kernel takes."""

import importlib
import os

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the kernels", allow_module_level=True)

FAMILIES = ("bitmask", "expansion", "hessian", "l0", "obs", "selection", "wanda")


def compilations(family):
    return importlib.import_module(f"fedspa_kernels.{family}.triton").compilations()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_names_of_the_described_kernels_are_unique(family):
    names = [described.name for described in compilations(family)]

    assert names
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_description_has_the_arguments_of_its_kernel(family):
    for described in compilations(family):
        assert list(described.signature) == described.kernel.arg_names, described.name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_description_gives_every_constant_of_its_kernel_and_no_other(family):
    for described in compilations(family):
        declared = {each.name for each in described.kernel.params if each.is_constexpr}
        constant = {name for name, kind in described.signature.items() if kind == "constexpr"}

        assert constant == set(described.constants), described.name
        assert declared <= constant, described.name
        # An argument that is not declared a constant is one only where it is None.
        unused = constant - declared
        assert all(described.constants[name] is None for name in unused), described.name


def test_a_kernel_compiles_where_there_is_no_gpu(tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    described = next(each for each in compilations("bitmask") if "_pack" in each.name)
    source = ASTSource(described.kernel, dict(described.signature), dict(described.constants))

    compiled = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": described.num_warps}
    )

    assert compiled.asm["cubin"]
