"""Server and clients of the Flower app against a federation in one process: the same bits."""

import pytest
from nearby_grid import NearbyGrid, make_federation, serve, without_page

import fedspa
from fedspa.config import ClientSpec
from fedspa.flower.run_config import read_run_config
from fedspa.loading import open_model


def in_process(folder, nodes, run_config):
    """The same clients in one process, into the folder "near"."""
    settings, network = read_run_config(run_config)
    source = open_model(network.model)
    clients = [
        ClientSpec(
            node["name"],
            node["text"],
            node.get("capacity", 1.0),
            node.get("sparsity"),
            node.get("samples", network.samples),
            network.seqlen,
        )
        for node in nodes.values()
    ]
    drawn = [spec.client(source, spec.read("text"), settings.seed) for spec in clients]
    with without_page():
        return fedspa.federate(network.model, drawn, settings, out=folder / "near")


def same_files(left, right):
    names = sorted(path.name for path in left.glob("*.safetensors"))
    assert names == sorted(path.name for path in right.glob("*.safetensors"))
    for name in names:
        assert (left / name).read_bytes() == (right / name).read_bytes(), name


CASES = {
    "l0": {},
    "mean, rows, bfloat16": dict(aggregation="mean", expansion="row", message_dtype="bfloat16"),
    "mask": dict(aggregation="mask", pruner="wanda"),
    "scaled masks": dict(aggregation="mask", scaling=True, schedule="synchronous"),
    "magnitude": dict(pruner="magnitude", weighting="samples"),
    "synchronous": dict(schedule="synchronous"),
    "every second block": dict(schedule="synchronous", synchronize_every=2),
    "rounds": dict(rounds=2, ramp="linear", layers_per_client=2),
    "synchronous rounds": dict(rounds=2, schedule="synchronous", layers_per_client=2, seed=3),
    "pattern": dict(sparsity="", pattern="2:4"),
    "statistics": dict(aggregation="statistics"),
    "statistics at once": dict(aggregation="statistics", schedule="one-shot", pruner="wanda"),
    "bfloat16 statistics": dict(aggregation="statistics", statistics_dtype="bfloat16"),
    "fixed point": dict(aggregation="statistics", statistics_dtype="int64"),
    "some clients": dict(participation=0.5, dropout=0.4, rounds=3, schedule="synchronous"),
    "block by block": dict(blocks_per_message=1),
    "two blocks a message": dict(blocks_per_message=2, rounds=2, layers_per_client=2),
    "small messages": dict(message_mib=0.01, schedule="synchronous", synchronize_every=2),
}


@pytest.mark.parametrize("case", CASES)
def test_the_bits_and_bytes_are_those_of_one_process(tmp_path, case):
    nodes, config = make_federation(tmp_path, **{"sparsity": 0.6, **CASES[case]})
    nodes[11] |= {"capacity": 0.7, "samples": 2}
    near = in_process(tmp_path, nodes, config)
    far = serve(NearbyGrid(nodes, config))
    same_files(tmp_path / "near", tmp_path / "out")
    assert far.layers == near.layers and far.blocks == near.blocks
    for left, right in zip(far.clients, near.clients, strict=True):
        assert (left.name, left.blocks, left.samples) == (right.name, right.blocks, right.samples)
        assert left.bytes_up == right.bytes_up
        # Over several rounds a client gets what it needs next, and at the end the last versions.
        assert left.bytes_down == right.bytes_down or config.get("rounds", 1) > 1
        assert left.loss == pytest.approx(right.loss) and left.wire_up > left.bytes_up
        assert left.sparsity == pytest.approx(right.sparsity, nan_ok=True)
