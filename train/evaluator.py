"""Held-out text during training: the model's loss, and that of all arms where it has splats.

May be changed here: what is evaluated, and what a record of it says. How arms are made and scored is
`gsa_jax.evaluation`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax

from gsa_jax.config import GPTNeoConfig
from gsa_jax.evaluation.arms import make_arms
from gsa_jax.evaluation.perplexity import cross_entropy, score_arms
from gsa_jax.text import read_documents, text_rows
from gsa_jax.text_files import TextFiles
from gsa_jax.train.config import TrainConfig
from gsa_jax.train.metrics import Record

if TYPE_CHECKING:
    from gsa_jax.tokenizer import Tokenizer


class Evaluator:
    """Scores the parameters of a run on `config.eval_text`.

    Raises:
        InputError: the text cannot be used.
    """

    def __init__(self, config: TrainConfig, model: GPTNeoConfig, tokenizer: Tokenizer, context: int) -> None:
        self._model = model
        self._text = TextFiles(config.eval_text, config.text_field)
        if self._text.paths:
            self._documents = read_documents(self._text, config.eval_documents or None)
            self._rows = text_rows(self._documents, tokenizer, model, context)

    def record(self, step: int, tensors: Mapping[str, jax.Array]) -> Record | None:
        """Cross-entropies, ratios of perplexity to exact, and the gap closed; None without a text.

        A model without splats, or with a window of all tokens, has one arm, `exact`.
        """
        if not self._text.paths:
            return None
        record: Record = {"kind": "eval", "step": step, "documents": len(self._documents)}
        splats = self._model.splats
        if splats is None or not (splats.has_splats or splats.keeps) or splats.window == "all":
            tokens = int(self._rows.attention_mask[:, 1:].sum())
            return record | {
                "tokens": tokens,
                "cross_entropy/exact": cross_entropy((self._model, tensors), self._rows),
            }
        arms = make_arms(self._model, tensors)
        evaluation = score_arms(arms, self._documents, self._rows, checkpoint="", text=str(self._text))
        record["tokens"] = evaluation.tokens
        for arm in evaluation.arms:
            record[f"cross_entropy/{arm.name}"] = arm.cross_entropy.value
            record[f"perplexity_ratio/{arm.name}"] = arm.perplexity_ratio.value
        if evaluation.gap_closed is not None:
            record["gap_closed"] = evaluation.gap_closed.value
        return record
