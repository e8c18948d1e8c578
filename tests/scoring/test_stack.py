"""A model run layer by layer gives what the model gives."""

import pytest
import torch

from tests.scoring.random_models import GQA, MOE, random_stack, random_tokens

# A quarter of the base width: embeddings, attention and logits are scaled.
MUP = {"use_mup": True, "mup_base_hidden_size": 192, "mup_embedding_mult": 3.0, "mup_attn_scale_power": 1.0}
TIED = {"untie_embeddings_and_output_weights": False}


@pytest.mark.parametrize("settings", [GQA, MOE, GQA | MUP, GQA | MUP | TIED], ids=["gqa", "moe", "mup", "mup-tied"])
def test_losses_are_the_models_own(settings: dict) -> None:
    stack = random_stack(settings)
    tokens_BT = random_tokens(3, 20)
    inputs_BS, targets_BS = tokens_BT[:, :-1], tokens_BT[:, 1:]
    hidden_SBD = stack.embed(inputs_BS)
    for layer in range(stack.num_layers):
        hidden_SBD = stack.layer(layer, hidden_SBD)
    positions_BS = torch.arange(19).expand_as(inputs_BS)
    with torch.no_grad():
        expected_BS = stack.model(inputs_BS, positions_BS, None, labels=targets_BS)
    torch.testing.assert_close(stack.losses(hidden_SBD, targets_BS), expected_BS, rtol=1e-6, atol=1e-6)
