"""A model as a stack of layers that can be run one by one: embed, run layer l, loss.

Axes: S positions, B sequences, D hidden width, V vocabulary of this tensor-parallel rank.
"""

from pathlib import Path

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_layer import TransformerLayer

from sparsecod_mcore.errors import UserError
from sparsecod_mcore.exchange import megatron
from sparsecod_mcore.exchange.hugging_face import HuggingFaceModel
from sparsecod_mcore.exchange.megatron_model import load_parameters
from sparsecod_mcore.model.build import build_model, evaluation_arguments
from sparsecod_mcore.scoring import parallel

_LOGITS_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 28}

POSITION_EMBEDDINGS = ("rope", "learned_absolute", "none")


class Stack:
    """One model of Megatron's, whole on this worker. Without gradients; deterministic.

    Hidden states are [S, B, D], the residual stream: what enters layer l is h_l, what the last layer returns is h_L,
    before the final norm.
    """

    def __init__(self, model: GPTModel, vocab_size: int | None = None) -> None:
        """`vocab_size` leaves out what pads the vocabulary."""
        if model.position_embedding_type not in POSITION_EMBEDDINGS:
            raise UserError(
                f"position embeddings {model.position_embedding_type!r} are not supported, "
                f"{', '.join(POSITION_EMBEDDINGS)} are"
            )
        self.model = model
        self.layers: list[TransformerLayer] = list(model.decoder.layers)
        self.num_layers = len(self.layers)
        self.hidden_size: int = model.config.hidden_size
        self.vocab_size: int = vocab_size or model.vocab_size
        self.max_positions: int = model.max_sequence_length
        weight = model.embedding.word_embeddings.weight
        self.dtype: torch.dtype = weight.dtype
        self.device: torch.device = weight.device
        self._rotary: tuple[int, torch.Tensor] | None = None

    @torch.no_grad()
    def embed(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """h_0 [S, B, D] of `tokens_BS`."""
        positions_BS = torch.arange(tokens_BS.shape[1], device=self.device).expand_as(tokens_BS)
        return self.model.embedding(tokens_BS, positions_BS)

    @torch.no_grad()
    def layer(self, index: int, hidden_SBD: torch.Tensor) -> torch.Tensor:
        """What layer `index`, counted from 0, makes of `hidden_SBD`, which stays as it is."""
        output_SBD, _ = self.layers[index](
            hidden_SBD, attention_mask=None, rotary_pos_emb=self.rotary_embedding(hidden_SBD.shape[0])
        )
        return output_SBD

    @torch.no_grad()
    def losses(self, hidden_SBD: torch.Tensor, targets_BS: torch.Tensor) -> torch.Tensor:
        """Cross-entropy [B, S] in nats of `targets_BS`, from h_L: final norm, output layer, softmax in float32.

        Some tokens at a time: the logits of all of them may be larger than everything else together.
        """
        S, B, D = hidden_SBD.shape
        tokens_at_once = max(1, _LOGITS_AT_ONCE[self.device.type] // self.model.output_layer.output_size_per_partition)
        parts = zip(
            hidden_SBD.reshape(S * B, 1, D).split(tokens_at_once),
            targets_BS.T.reshape(1, S * B).split(tokens_at_once, dim=1),
            strict=True,
        )
        losses_1N = torch.cat([self._losses(hidden_N1D, targets_1N) for hidden_N1D, targets_1N in parts], dim=1)
        return losses_1N.view(S, B).T

    def _losses(self, hidden_SBD: torch.Tensor, targets_BS: torch.Tensor) -> torch.Tensor:
        model = self.model
        tied = model.share_embeddings_and_output_weights
        weight_VD = model.shared_embedding_or_output_weight() if tied else None
        logits_SBV, _ = model.output_layer(model.decoder.final_layernorm(hidden_SBD), weight=weight_VD)
        return model.compute_language_model_loss(targets_BS, model._scale_logits(logits_SBV))

    def rotary_embedding(self, length: int) -> torch.Tensor | None:
        if self.model.position_embedding_type != "rope":
            return None
        if self._rotary is None or self._rotary[0] != length:
            self._rotary = length, self.model.rotary_pos_emb(length)
        return self._rotary[1]


def model_files(path: Path) -> list[Path]:
    """The files that `load_stack` reads of `path`."""
    checkpoint = megatron.find_model(path)
    if checkpoint is None:
        return HuggingFaceModel(path).files
    return sorted(file for file in checkpoint.iterdir() if file.is_file())


def load_stack(path: Path, dtype: torch.dtype = torch.float32, *, tensor: int = 1, expert: int = 1) -> Stack:
    """Load a Hugging Face directory, or a torch_dist checkpoint given as itself, its folder, or its run's directory.

    Collective: under torchrun every rank calls it, and gets its part of the model at tensor- and expert-parallel sizes
    `tensor` and `expert`, whatever the checkpoint was saved at. Raises `UserError` if it is no model or does not fit.
    """
    checkpoint = megatron.find_model(path)
    source = HuggingFaceModel(path) if checkpoint is None else None
    parallel.initialise(tensor, expert)
    if source is not None:
        settings = source.settings
    else:
        assert checkpoint is not None
        settings = vars(megatron.read_arguments(checkpoint))
    args = evaluation_arguments(settings, dtype)
    model = build_model(args)
    if source is not None:
        load_parameters(model, source)
    else:
        assert checkpoint is not None
        megatron.load_weights(model, checkpoint)
    return Stack(model, args.vocab_size)
