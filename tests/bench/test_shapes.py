import pytest

from bench.shapes import MODELS, SHAPES, Shape, find_model, find_shape, layers

# Parameters of the linear layers of all blocks, from the models' cards, in billions.
PARAMETERS = {
    "opt-125m": 0.085,
    "opt-1.3b": 1.21,
    "opt-66b": 65.2,
    "llama-2-7b": 6.48,
    "llama-2-70b": 68.4,
    "llama-3-8b": 6.98,
}


@pytest.mark.parametrize(("name", "billions"), PARAMETERS.items())
def test_layers_add_up_to_the_model(name, billions):
    model = MODELS[name]
    block = sum(shape.rows * shape.cols for shape in layers(model).values())
    assert model.blocks * block / 1e9 == pytest.approx(billions, rel=0.01)


def test_grouped_queries_have_narrow_keys_and_opt_has_no_gate():
    assert find_shape("llama-2-70b.k") == Shape("llama-2-70b", "k", 1024, 8192)
    assert find_shape("llama-2-7b.down") == Shape("llama-2-7b", "down", 4096, 11008)
    assert find_shape("opt-125m.down")[2:] == (768, 3072)
    assert "opt-125m.gate" not in SHAPES


def test_names_lead_back_to_their_shapes():
    assert all(find_shape(shape.name) is shape for shape in SHAPES.values())
    assert find_shape("3000x5000") == Shape("", "", 3000, 5000)
    assert find_shape("3000x5000").name == "3000x5000"


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-2-7b.fc1", "0x64", "64x", "64x64x64", ""])
def test_an_unknown_shape_is_answered_with_the_known(name):
    with pytest.raises(ValueError, match="not known; pass ROWSxCOLS .*llama-3-8b.*gate"):
        find_shape(name)


def test_an_unknown_model_is_answered_with_the_known():
    with pytest.raises(ValueError, match="model 'llama' is not known; choose from opt-125m, "):
        find_model("llama")
