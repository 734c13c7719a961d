"""How much of the machine's matrix rate does a training step reach?

Model FLOPs, counted on paper: what a step must multiply, and nothing that padding, recomputation or logits that nobody
asked for add. For a token that passes a matrix of N weights, the forward takes 2N, the gradient of the input 2N, and
the gradient of the weights 2N more where the matrix is trained: **6N trained, 4N frozen** (all matrices here have
something trained before them). A token of a sequence of length L attends to L tokens: 4·L·hidden per layer forward
(scores, and their sum over values), twice that backward, **12·L·hidden**. The head is passed by scored tokens only.
Look-ups, norms, softmax, GELU, dropout and the optimizer are not counted (Chowdhery et al., 2022, "PaLM", appendix B).
"""

from __future__ import annotations

from dataclasses import dataclass

from behrt.config import BEHRTConfig

TRAINED, FROZEN = 6, 4


@dataclass(frozen=True)
class Work:
    """What some steps were about.

    Attributes:
        tokens: real tokens, `[CLS]` and `[SEP]` included.
        scored: those that the loss is taken over.
        squared_lengths: sum over sequences of length squared.
    """

    tokens: int
    scored: int
    squared_lengths: int


def training_flops(
    config: BEHRTConfig, work: Work, *, lora_rank: int | None, adapted: int = 4, projected: bool = True
) -> int:
    """Model FLOPs of training over `work`.

    Args:
        lora_rank: None where everything is trained; else the encoder is frozen, embeddings and head are trained.
        adapted: projections of each layer's attention that have an adapter.
        projected: whether embeddings are narrower than the hidden states, as `behrt`'s; BERT's are not.
    """
    hidden = config.hidden_dim
    layer = 4 * hidden**2 + 2 * hidden * config.feedforward_dim
    if lora_rank is None:
        encoder = TRAINED * layer
    else:
        encoder = FROZEN * layer + TRAINED * adapted * 2 * hidden * lora_rank
    per_token = config.num_layers * encoder + (TRAINED * config.embedding_dim * hidden if projected else 0)
    per_scored = TRAINED * (hidden**2 + hidden * config.vocab_size)
    per_pair = 12 * hidden * config.num_layers
    return per_token * work.tokens + per_scored * work.scored + per_pair * work.squared_lengths
