"""What docs/privacy.md says that statistics reveal."""

import torch
from small_models import VOCABULARY, make_clients, make_model

from fedspa import Settings, federate
from fedspa.model import decoder_blocks
from fedspa.triangle import unpack_triangle


def test_the_first_hessian_gives_away_how_often_each_token_was_used():
    """A server that knows the model solves a client's first message for its word counts."""
    client, messages = make_clients(1, samples=6)[0], []
    settings = Settings(sparsity=0.5, aggregation="statistics")
    federate(make_model(), [client], settings, observe=messages.append)
    (sent,) = [s for s in messages[0].statistics if "self_attn.q_proj" in s.layers]
    model = make_model()
    with torch.no_grad():
        every = model.get_input_embeddings().weight
        inputs = decoder_blocks(model)[0].input_layernorm(every).double()
    hessian = unpack_triangle(sent.values, inputs.shape[1]).double()
    # One equation for each entry of the triangle, one unknown for each token.
    upper = torch.triu_indices(*hessian.shape).unbind()
    products = inputs[:, upper[0]] * inputs[:, upper[1]]
    # The padding token is all zeros, and so cannot be counted.
    seen = inputs.any(dim=1)
    equations = torch.linalg.lstsq(products[seen].mT, hessian[upper].unsqueeze(1), driver="gels")
    solved = equations.solution.squeeze(1)
    counts = torch.bincount(client.tokens.flatten(), minlength=VOCABULARY)
    assert int(seen.sum()) == VOCABULARY - 1
    assert torch.equal(solved.round().long(), counts[seen])
