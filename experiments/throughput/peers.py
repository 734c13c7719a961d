"""What would a user train instead of `behrt`, on the very same patients, windows and masks?

`hugging_face` is `transformers.BertForMaskedLM` with PEFT's LoRA or everything trained, its batches padded to their
longest sequence; `guide` is the recipe of the troubleshooting guide, `nn.TransformerEncoder` over four embeddings,
padded to the full length, with logits at every position. Order, windows and masks are functions of (seed, epoch, step):
`PaddedBatches` draws what `behrt.batches.TrainingBatches` draws, and lays it out as the peers expect it.

Two things favour the peers. BERT sees neither ages nor visit numbers. And padding is laid out by a few numpy calls
here, where a customary collator loops over patients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from behrt.batches import IGNORED, FlatSequences, MaskedSequences, cut, gather
from behrt.config import BEHRTConfig
from behrt.masking import Stream, mask_tokens, stream
from behrt.model import age_bins
from behrt.sequences import PreparedSplit
from behrt.trainer import LossSums
from behrt.vocabulary import PAD

LORA_RANK = 16


@dataclass(frozen=True)
class PaddedBatch:
    """A row a patient, each tensor `[patients, length]`.

    Attributes:
        codes: int64 ids as the model sees them, `[PAD]` behind the end.
        ages: float32 years; NaN where unknown, and behind the end.
        visits: int64 visit numbers.
        tokens: bool, False behind the end.
        labels: int64 original ids where scored, -100 elsewhere.
    """

    codes: Tensor
    ages: Tensor
    visits: Tensor
    tokens: Tensor
    labels: Tensor

    @property
    def num_tokens(self) -> int:
        """Real tokens, padding not counted."""
        return int(self.tokens.sum())

    @property
    def num_scored(self) -> int:
        return int((self.labels != IGNORED).sum())

    @property
    def squared_lengths(self) -> int:
        """Sum over patients of length squared: the pairs that attention looks at."""
        return int(self.tokens.sum(dim=1).square().sum())

    def to(self, device: torch.device) -> Self:
        return type(self)(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def halves(self) -> None:
        """The peers do not go on in smaller parts where memory runs out."""
        return None


def pad(masked: MaskedSequences, length: int | None) -> PaddedBatch:
    """Lays sequences into a row each, `length` long or, where that is None, as long as the longest."""
    lengths = np.diff(masked.sequences.offsets)
    tokens = np.arange(length or int(lengths.max())) < lengths[:, None]  # [patients, length]

    def lay(values: npt.NDArray[Any], padding: float, dtype: type[np.generic]) -> Tensor:
        laid = np.full(tokens.shape, padding, dtype=dtype)
        laid[tokens] = values
        return torch.from_numpy(laid)

    return PaddedBatch(
        codes=lay(masked.shown, PAD, np.int64),
        ages=lay(masked.sequences.ages, np.nan, np.float32),
        visits=lay(masked.sequences.visits, 0, np.int64),
        tokens=torch.from_numpy(tokens),
        labels=lay(np.where(masked.scored, masked.sequences.codes, IGNORED), IGNORED, np.int64),
    )


def pad_all(masked: MaskedSequences, patients_per_batch: int, length: int | None) -> list[PaddedBatch]:
    """An evaluation set, so many patients a batch."""
    offsets = masked.sequences.offsets
    batches = []
    for first in range(0, len(masked.sequences), patients_per_batch):
        bounds = offsets[first : first + patients_per_batch + 1]
        here = slice(int(bounds[0]), int(bounds[-1]))
        sequences = FlatSequences(
            codes=masked.sequences.codes[here],
            ages=masked.sequences.ages[here],
            visits=masked.sequences.visits[here],
            offsets=bounds - bounds[0],
        )
        batches.append(pad(MaskedSequences(sequences, masked.shown[here], masked.scored[here]), length))
    return batches


class PaddedBatches:
    """The steps of any epoch, as `TrainingBatches` of the same arguments draws them; one micro-batch a step.

    Args:
        length: of every row; None is the longest sequence of each batch.
    """

    def __init__(
        self,
        split: PreparedSplit,
        patients: npt.NDArray[np.int64],
        *,
        batch_size: int,
        max_position: int,
        vocab_size: int,
        seed: int,
        mlm_probability: float,
        length: int | None,
    ) -> None:
        self._mlm_probability = mlm_probability
        self._split, self._patients, self._batch_size = split, patients, batch_size
        self._max_position, self._vocab_size, self._seed, self._length = max_position, vocab_size, seed, length

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._patients) // self._batch_size)

    def epoch(
        self, epoch: int, first_step: int = 0, *, accumulation_steps: int | None = None
    ) -> Iterator[list[PaddedBatch]]:
        assert accumulation_steps in (None, 1)
        order = stream(self._seed, Stream.ORDER, epoch).permutation(self._patients)
        for step in range(first_step, self.steps_per_epoch):
            patients = order[step * self._batch_size : (step + 1) * self._batch_size]
            windows = stream(self._seed, Stream.WINDOWS, epoch, step)
            masks = stream(self._seed, Stream.TRAINING_MASKS, epoch, step)
            sequences, _ = cut(gather(self._split, patients), self._max_position, windows)
            shown, scored = mask_tokens(
                sequences.codes,
                vocab_size=self._vocab_size,
                generator=masks,
                selected_share=self._mlm_probability,
            )
            yield [pad(MaskedSequences(sequences, shown, scored), self._length)]


# Hugging Face


def hugging_face(config: BEHRTConfig, *, lora: bool) -> nn.Module:
    """`BertForMaskedLM` of the same size; BERT's embeddings are as wide as its hidden states.

    Dropout is BERT's customary 0.1, on attention weights too, and attention is SDPA, as by default. With `lora`, PEFT's
    adapters of rank 16 on query, key, value and output; embeddings and head are trained.
    """
    import transformers

    model = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            intermediate_size=config.feedforward_dim,
            max_position_embeddings=config.max_position,
            pad_token_id=PAD,
        )
    )
    return with_peft(model) if lora else model


def with_peft(model: nn.Module) -> nn.Module:
    """Adapters by PEFT, embeddings and head trained. PEFT copies these two, which unties the decoder from the table.

    The embeddings are named in full: "embeddings" alone matches "word_embeddings" as well, whose copy inside the copy
    would count as trained and never be read.
    """
    import peft

    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=LORA_RANK,
            lora_alpha=2 * LORA_RANK,
            target_modules=["query", "key", "value", "attention.output.dense"],
            modules_to_save=["bert.embeddings", "cls"],
        ),
    )


def hugging_face_sums(model: nn.Module, batch: PaddedBatch) -> LossSums:
    """Summed loss and hits, from the mean that BERT returns."""
    output = model(input_ids=batch.codes, attention_mask=batch.tokens.long(), labels=batch.labels)
    return LossSums(output.loss * batch.num_scored, (output.logits.argmax(dim=-1) == batch.labels).sum())


def hugging_face_loss(model: nn.Module, batch: PaddedBatch) -> Tensor:
    """Mean loss of the scored tokens, as a training loop asks for it."""
    loss: Tensor = model(input_ids=batch.codes, attention_mask=batch.tokens.long(), labels=batch.labels).loss
    return loss


# The recipe of the troubleshooting guide


class GuideModel(nn.Module):
    """`nn.TransformerEncoder` over code, age, visit and position embeddings, and a head at every position.

    The layers are normalised before (pre-LN), as `behrt`'s are, so that losses can be compared.
    """

    def __init__(self, config: BEHRTConfig, *, dropout: float = 0.1) -> None:
        super().__init__()
        self.codes = nn.Embedding(config.vocab_size, config.embedding_dim, padding_idx=PAD)
        self.ages = nn.Embedding(config.age_bins, config.embedding_dim)
        self.visits = nn.Embedding(config.max_visits, config.embedding_dim)
        self.positions = nn.Embedding(config.max_position, config.embedding_dim)
        self.norm = nn.LayerNorm(config.embedding_dim)
        self.dropout = nn.Dropout(dropout)
        self.projection = nn.Linear(config.embedding_dim, config.hidden_dim)
        layer = nn.TransformerEncoderLayer(
            config.hidden_dim,
            config.num_heads,
            config.feedforward_dim,
            dropout=dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.encoder = nn.TransformerEncoder(
            layer, config.num_layers, norm=nn.LayerNorm(config.hidden_dim), enable_nested_tensor=False
        )
        self.head = nn.Sequential(
            nn.Linear(config.hidden_dim, config.hidden_dim),
            nn.GELU(),
            nn.LayerNorm(config.hidden_dim),
            nn.Linear(config.hidden_dim, config.vocab_size),
        )

    def forward(self, batch: PaddedBatch) -> Tensor:
        """Logits, [patients, length, vocab_size]."""
        positions = torch.arange(batch.codes.shape[1], device=batch.codes.device)
        summed = (
            self.codes(batch.codes)
            + self.ages(age_bins(batch.ages, self.ages.num_embeddings))
            + self.visits(batch.visits.clamp(0, self.visits.num_embeddings - 1))
            + self.positions(positions)
        )
        hidden = self.projection(self.dropout(self.norm(summed)))
        logits: Tensor = self.head(self.encoder(hidden, src_key_padding_mask=~batch.tokens))
        return logits


class GuideLoRA(nn.Module):
    """The guide's adapter around an output projection.

    `nn.MultiheadAttention` reads `weight` and `bias` of the projection and never calls it: the adapter does not act.
    That is the recipe, and it costs no time; `behrt`'s own adapters do act.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) / rank)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + x @ self.lora_A.T @ self.lora_B.T
        return result


def guide(config: BEHRTConfig, *, lora: bool, dropout: float = 0.1) -> GuideModel:
    """The recipe's model; with `lora` the encoder is frozen but for the guide's adapters around `out_proj`."""
    model = GuideModel(config, dropout=dropout)
    if lora:
        model.encoder.requires_grad_(False)
        for layer in model.encoder.layers:
            layer.self_attn.out_proj = GuideLoRA(layer.self_attn.out_proj, LORA_RANK)
    return model


def guide_sums(model: nn.Module, batch: PaddedBatch) -> LossSums:
    """Summed loss and hits; logits at every position."""
    logits = model(batch)
    loss = F.cross_entropy(logits.float().flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return LossSums(loss, (logits.argmax(dim=-1) == batch.labels).sum())


def guide_loss(model: nn.Module, batch: PaddedBatch) -> Tensor:
    """Mean loss of the scored tokens."""
    return F.cross_entropy(model(batch).float().flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED)


def copy_of_behrt(model: nn.Module, config: BEHRTConfig) -> GuideModel:
    """The recipe's model with the weights of a `BEHRTForMaskedLM` that has no adapters, and without dropout."""
    source = model.state_dict()

    def joined(layer: int, kind: str) -> Tensor:
        place = f"behrt.encoder.layers.{layer}.attention"
        return torch.cat([source[f"{place}.{name}.{kind}"] for name in ("query", "key", "value")])

    named = {f"{name}.weight": f"behrt.embeddings.{name}.weight" for name in ("codes", "ages", "visits", "positions")}
    pairs = {"norm": "behrt.embeddings.norm", "projection": "behrt.embeddings.projection"}
    pairs |= {"encoder.norm": "behrt.encoder.norm"}
    pairs |= {"head.0": "head.dense", "head.2": "head.norm", "head.3": "head.decoder"}
    for layer in range(config.num_layers):
        here, there = f"encoder.layers.{layer}", f"behrt.encoder.layers.{layer}"
        pairs |= {
            f"{here}.self_attn.out_proj": f"{there}.attention.output",
            f"{here}.linear1": f"{there}.feedforward.up",
            f"{here}.linear2": f"{there}.feedforward.down",
            f"{here}.norm1": f"{there}.attention_norm",
            f"{here}.norm2": f"{there}.feedforward_norm",
        }
    named |= {f"{here}.{kind}": f"{there}.{kind}" for here, there in pairs.items() for kind in ("weight", "bias")}
    state = {here: source[there] for here, there in named.items()}
    for layer in range(config.num_layers):
        for kind in ("weight", "bias"):
            state[f"encoder.layers.{layer}.self_attn.in_proj_{kind}"] = joined(layer, kind)
    copied = guide(config, lora=False, dropout=0.0)
    copied.codes.padding_idx = None  # behrt trains every row of its table
    copied.load_state_dict(state)
    return copied
