"""A model as lm-eval knows models. Importing this registers it there under the name ``sparsecod``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from sparsecod_mcore.errors import UserError
from sparsecod_mcore.evaluation.likelihood import Likelihoods, Score, make_query
from sparsecod_mcore.evaluation.tokenizer import PromptTokenizer, find_tokenizer, load_prompt_tokenizer
from sparsecod_mcore.scoring.run import DTYPES
from sparsecod_mcore.scoring.stack import load_stack

type Encoded = tuple[object, list[int], list[int]]  # a request, its context and its continuation


class StackLM(TemplateLM):
    """A loaded model. Every rank is given every request, and has every result: the ranks share them out themselves."""

    def __init__(self, likelihoods: Likelihoods, tokenizer: PromptTokenizer) -> None:
        super().__init__()
        self._likelihoods, self._tokenizer = likelihoods, tokenizer
        self.max_length: int = likelihoods.stack.max_positions

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.text.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.prefix_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        return self._tokenizer.encode(string, add_special_tokens)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        return scores

    def _loglikelihood_tokens(self, requests: Sequence[Encoded], **_: object) -> Sequence[Score]:
        return self._likelihoods.score(
            [make_query(context, continuation, self.max_length) for _, context, continuation in requests]
        )

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        windows: list[Encoded] = []
        counts = []
        for (text,) in (request.args for request in requests):
            tokens = self.tok_encode(text)
            mine = list(get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1))
            windows += [(None, *make_disjoint_window(window)) for window in mine]
            counts.append(len(mine))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores).log_likelihood for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> NoReturn:
        raise UserError("this model answers with likelihoods only; tasks that have it write text are not supported")


@register_model("sparsecod")
class CheckpointLM(StackLM):
    """A model by the name of its folder, for lm-eval's own commands and `simple_evaluate`."""

    def __init__(
        self,
        model: str,
        tokenizer: str | None = None,
        eos_token: str | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        tensor_parallel_size: int = 1,
        expert_parallel_size: int = 1,
        batch_tokens: int | None = None,
        **_: object,  # lm-eval also gives a batch size and a device
    ) -> None:
        """Arguments are those of tools/evaluate.py."""
        prompts = load_prompt_tokenizer(
            find_tokenizer(Path(model), None if tokenizer is None else Path(tokenizer)), eos_token
        )
        stack = load_stack(Path(model), DTYPES[dtype], tensor=tensor_parallel_size, expert=expert_parallel_size)
        prompts.check(stack.vocab_size, model)
        super().__init__(Likelihoods(stack, batch_tokens), prompts)
