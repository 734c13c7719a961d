"""What does BEHRT compute from a patient's codes, ages and visits?

A pre-LN transformer encoder over the sum of four embeddings (Li et al., 2019, "BEHRT: Transformer for Electronic
Health Records"), and a head that predicts masked codes. Several patients may share one row: attention never crosses
from one to the next. There is no `nn.MultiheadAttention` here on purpose: it reads the `weight` of its output
projection without calling the layer, so that an adapter put there would never act.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from behrt.attention import PatientGroups, PatientRuns, Patients, attend, runs_can_stay
from behrt.cheap_layers import Dropout, Linear, lowered, missing_to_recur
from behrt.config import BEHRTConfig, UserError
from behrt.devices import to_device

YEARS_PER_AGE_BIN = 5
TABLE_STD = 0.02
"""Standard deviation of the initial embedding tables and of the decoder, as in BERT (Devlin et al., 2019)."""


def age_bins(ages: Tensor, num_bins: int) -> Tensor:
    """Ages in years to bins: 0 is unknown (NaN), then five years each, the last one open.

    >>> age_bins(torch.tensor([float("nan"), 0.0, 4.9, 5.0, 99.9, 100.0, 117.0]), 22).tolist()
    [0, 1, 1, 2, 20, 21, 21]
    """
    bins = (torch.nan_to_num(ages) / YEARS_PER_AGE_BIN).floor().clamp(0, num_bins - 2).long() + 1
    return torch.where(torch.isnan(ages), 0, bins)


def positions_within(segments: Tensor) -> Tensor:
    """The position of each token within its patient: it restarts at 0 where the segment changes; padding has 0.

    >>> positions_within(torch.tensor([[0, 0, 0, 1, 1, -1, -1]])).tolist()
    [[0, 1, 2, 0, 1, 0, 0]]
    """
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)  # [rows, length]
    starts = torch.zeros_like(index)
    starts[:, 1:] = torch.where(segments[:, 1:] != segments[:, :-1], index[:, 1:], 0)
    return torch.where(segments < 0, 0, index - starts.cummax(dim=1).values)


def real_tokens(codes: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which tokens are no padding, and how many each patient has.

    Args:
        codes: [rows, length], for its shape.
        segments: int [rows, length]; the patient of the row that a token belongs to, -1 on padding.

    Returns:
        Indices into the flattened rows, int64 [tokens], on the device of `segments`; and int64 [patients] on the CPU.

    >>> real_tokens(torch.zeros(2, 4), torch.tensor([[0, 0, 1, -1], [0, -1, -1, -1]]))
    (tensor([0, 1, 2, 4]), tensor([2, 1, 1]))
    """
    rows, length = codes.shape
    if segments is None:
        return torch.arange(codes.numel(), device=codes.device), torch.full((rows,), length)
    row = torch.arange(rows, device=segments.device)[:, None]
    patient = (segments + row * (segments.max() + 1)).flatten()
    tokens = (segments.flatten() >= 0).nonzero().squeeze(1)
    _, counts = torch.unique_consecutive(patient[tokens], return_counts=True)
    return tokens, counts.cpu()


def uniform_(tensor: Tensor, bound: float, generator: torch.Generator | None) -> None:
    """Fills a tensor with draws from U(-bound, bound), bit for bit the same on every machine and device.

    Integers are drawn on the CPU and scaled by one multiplication, which IEEE 754 rounds in one way only; a normal draw
    goes through logarithms and cosines, whose last bits depend on the machine. So a frozen random encoder, which
    no checkpoint stores, is rebuilt exactly from its seed wherever its adapters are loaded.
    """
    steps = 1 << 23  # all integers up to 2^23 are exact in float32
    draws = torch.randint(-steps, steps, tensor.shape, generator=generator, dtype=torch.int32, device="cpu")
    with torch.no_grad():
        tensor.copy_(draws.to(torch.float32) * (bound / steps))


def initialise(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draws every weight of `model` in the order of its modules, from `generator` (None: torch's own).

    Tables have standard deviation 0.02: a LayerNorm follows them, so only their ratio to the learning rate matters.
    Linear layers are uniform within 1/sqrt(fan-in), with zero biases: a frozen random encoder has to carry its input
    onward, and 0.02 would shrink it, more so the narrower the layer. The decoder has 0.02 again: it reads a normalised
    vector, so its first logits are close to 0 and the first loss is close to ln(vocab_size).
    """
    decoders = {module.decoder for module in model.modules() if isinstance(module, MaskedLMHead)}
    for module in model.modules():
        if isinstance(module, nn.Embedding) or module in decoders:
            uniform_(module.weight, TABLE_STD * math.sqrt(3), generator)
        elif isinstance(module, nn.Linear):
            uniform_(module.weight, 1 / math.sqrt(module.in_features), generator)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, (nn.Linear, nn.LayerNorm)) and module.bias is not None:
            nn.init.zeros_(module.bias)


class Embeddings(nn.Module):
    """Code, age, visit and position tables, summed, normalised and projected to the width of the encoder."""

    def __init__(self, config: BEHRTConfig) -> None:
        super().__init__()
        self.codes = nn.Embedding(config.vocab_size, config.embedding_dim)
        self.ages = nn.Embedding(config.age_bins, config.embedding_dim)
        self.visits = nn.Embedding(config.max_visits, config.embedding_dim)
        self.positions = nn.Embedding(config.max_position, config.embedding_dim)
        self.norm = nn.LayerNorm(config.embedding_dim)
        self.dropout = Dropout(config.dropout)
        self.projection = Linear(config.embedding_dim, config.hidden_dim)

    def forward(self, codes: Tensor, ages: Tensor, visits: Tensor, positions: Tensor) -> Tensor:
        summed = (
            self.codes(codes)
            + self.ages(age_bins(ages, self.ages.num_embeddings))
            + self.visits(visits.clamp(0, self.visits.num_embeddings - 1))
            + self.positions(positions)
        )  # [rows, length, embedding_dim]
        projected: Tensor = self.projection(self.dropout(self.norm(summed)))
        return projected  # [rows, length, hidden_dim]


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al., 2017) whose four projections are plain, separately called layers."""

    def __init__(self, config: BEHRTConfig) -> None:
        super().__init__()
        self.query = Linear(config.hidden_dim, config.hidden_dim)
        self.key = Linear(config.hidden_dim, config.hidden_dim)
        self.value = Linear(config.hidden_dim, config.hidden_dim)
        self.output = Linear(config.hidden_dim, config.hidden_dim)

    def forward(self, hidden: Tensor, groups: Patients, asking: Tensor | None = None) -> Tensor:
        """`hidden` [tokens, hidden_dim]; with `asking` (int64 indices) the result is that of these tokens alone."""
        asks = hidden if asking is None else hidden[asking]
        attended: Tensor = self.output(attend(self.query(asks), self.key(hidden), self.value(hidden), groups))
        return attended  # [tokens that ask, hidden_dim]


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them, applied to each token on its own."""

    def __init__(self, config: BEHRTConfig) -> None:
        super().__init__()
        self.up = Linear(config.hidden_dim, config.feedforward_dim)
        self.down = Linear(config.feedforward_dim, config.hidden_dim)

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.down(F.gelu(self.up(hidden)))
        return result


class EncoderLayer(nn.Module):
    """Attention and feed-forward, each normalised before and added to what it read (pre-LN; Xiong et al., 2020)."""

    def __init__(self, config: BEHRTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_dim)
        self.attention = Attention(config)
        self.feedforward_norm = nn.LayerNorm(config.hidden_dim)
        self.feedforward = FeedForward(config)
        self.dropout = Dropout(config.dropout)

    def forward(self, hidden: Tensor, groups: Patients, asking: Tensor | None = None) -> Tensor:
        """`hidden` [tokens, hidden_dim]; with `asking` (int64 indices) the result is that of these tokens alone."""
        attended = self.attention(lowered(self.attention_norm(hidden)), groups, asking)
        hidden = hidden if asking is None else hidden[asking]
        # the sum of all layers stays in its precision; torch adds the like much faster than the unlike
        hidden = hidden + self.dropout(attended).to(hidden.dtype)
        forwarded = self.feedforward(lowered(self.feedforward_norm(hidden)))
        hidden = hidden + self.dropout(forwarded).to(hidden.dtype)
        return hidden


class Encoder(nn.Module):
    """The stack of layers, and the LayerNorm that a pre-LN stack needs at its end."""

    def __init__(self, config: BEHRTConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_dim)

    def forward(self, hidden: Tensor, groups: Patients, wanted: Tensor | None = None) -> Tensor:
        """The patients' tokens end to end, through all layers.

        Args:
            hidden: float [tokens, hidden_dim].
            groups: whose tokens they are.
            wanted: int64 indices, rising, of the tokens whose result is needed; None is all. The last layer computes
                only these: the others matter to it as keys and values alone. On the CPU nobody waits for a GPU.

        Returns:
            [tokens wanted, hidden_dim].
        """
        *layers, last = self.layers
        for layer in layers:
            hidden = layer(hidden, groups)
        if wanted is None:
            hidden = last(hidden, groups)
        else:
            hidden = last(hidden, groups.asking(wanted), to_device(wanted, hidden.device))
        normalised: Tensor = self.norm(hidden)
        return normalised


class BEHRT(nn.Module):
    """The encoder: one vector of `hidden_dim` for each token of each patient's history.

    Args:
        config: the model's shape.
        generator: where the initial weights are drawn from; None is torch's own generator. Nothing else is drawn.

    >>> model = BEHRT(BEHRTConfig.small(vocab_size=100)).eval()
    >>> codes = torch.tensor([[2, 17, 3, 42, 3]])
    >>> ages, visits = torch.tensor([[61.2, 61.2, 61.2, 63.0, 63.0]]), torch.tensor([[0, 1, 1, 2, 2]])
    >>> model(codes, ages, visits).shape
    torch.Size([1, 5, 128])
    """

    def __init__(self, config: BEHRTConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):  # torch's layers draw weights of their own, which are not used
            self.embeddings = Embeddings(config)
            self.encoder = Encoder(config)
        initialise(self, generator)

    def forward(
        self,
        codes: Tensor,
        ages: Tensor,
        visits: Tensor,
        attention_mask: Tensor | None = None,
        segments: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        scored: Tensor | None = None,
    ) -> Tensor:
        """Hidden states, float, [batch, length, hidden_dim]; those of padding are zero.

        All arguments are [batch, length].

        Args:
            codes: int, token ids below `vocab_size`.
            ages: float, years; NaN is unknown.
            visits: int, the visit's number; from `max_visits` on all count as the last.
            attention_mask: 1 or True for a token, 0 or False for padding. Without it nothing is padding, save what
                `segments` says.
            segments: int, which patient of the row a token belongs to; -1 is padding. A patient's tokens lie side by
                side. Without it each row is one patient. Like `scored` it may stay on the CPU, where what depends on
                it is found without waiting for a GPU.
            positions: int, below `max_position`. Without it they count from 0 for each patient.
            scored: bool. The result is that of these tokens alone, [number scored, hidden_dim], in the order of
                `scored.nonzero()`, and the last layer computes no others.

        Raises:
            UserError: a patient has more tokens than the model has positions (where `positions` are not given).
        """
        if attention_mask is not None:
            tokens = attention_mask.bool()
            segments = torch.where(tokens, 0 if segments is None else segments, -1)
        if positions is None:
            positions = self._positions(codes, segments)
        tokens, counts = real_tokens(codes, segments)
        number, wanted = len(tokens), None
        if scored is not None:
            wanted = scored.to(tokens.device).flatten()[tokens].nonzero().squeeze(1)
        if filling := missing_to_recur(number, 64, codes.device):  # one more patient, whom nobody reads
            counts = torch.cat([counts, torch.tensor([filling])])
            tokens = torch.cat([tokens, tokens.new_zeros(filling)])
        tokens = to_device(tokens, codes.device)
        embedded = self.embeddings(*(x.flatten()[tokens] for x in (codes, ages, visits, positions)))
        groups = self._patients(counts, embedded.device)
        if wanted is not None:
            repeated = missing_to_recur(len(wanted), 16, codes.device)  # the last token, which asks so often
            result: Tensor = self.encoder(embedded, groups, F.pad(wanted, (0, repeated), value=len(tokens) - 1))
            return result[: len(wanted)]  # [scored, hidden_dim]
        hidden: Tensor = self.encoder(embedded, groups)[:number]  # [tokens, hidden_dim]
        if number < codes.numel():
            hidden = hidden.new_zeros(codes.numel(), hidden.shape[1]).index_copy(0, tokens[:number], hidden)
        return hidden.view(*codes.shape, -1)

    def _patients(self, counts: Tensor, device: torch.device) -> Patients:
        heads = self.config.num_heads
        if runs_can_stay(device, self.config.hidden_dim // heads):
            return PatientRuns.of(counts, heads=heads, longest=self.config.max_position, device=device)
        return PatientGroups.of(counts, heads=heads, device=device)

    def _positions(self, codes: Tensor, segments: Tensor | None) -> Tensor:
        length = longest = codes.shape[1]
        if segments is None:
            positions = torch.arange(length, device=codes.device).expand_as(codes)
        else:
            positions = positions_within(segments.to(codes.device))
            if length > self.config.max_position:  # only then is it worth waiting for the device
                longest = int(positions.max()) + 1
        if longest > self.config.max_position:
            raise UserError(
                f"--max-position {self.config.max_position}: a sequence has {longest} tokens; "
                "shorten it, or build the model with more positions"
            )
        return positions


class MaskedLMHead(nn.Module):
    """Linear, GELU, LayerNorm, Linear to the vocabulary, as BERT's; its decoder is not tied to the code table."""

    def __init__(self, config: BEHRTConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_dim, config.hidden_dim)
        self.norm = nn.LayerNorm(config.hidden_dim)
        self.decoder = Linear(config.hidden_dim, config.vocab_size)

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.decoder(self.norm(F.gelu(self.dense(hidden))))
        return logits


class BEHRTForMaskedLM(nn.Module):
    """The encoder with a head that predicts masked codes. Arguments as for `BEHRT`.

    >>> model = BEHRTForMaskedLM(BEHRTConfig.small(vocab_size=100)).eval()
    >>> codes, ages, visits = torch.tensor([[2, 4, 3]]), torch.tensor([[61.2, 61.2, 61.2]]), torch.tensor([[0, 1, 1]])
    >>> model(codes, ages, visits).shape
    torch.Size([1, 3, 100])
    >>> model(codes, ages, visits, scored=codes == 4).shape
    torch.Size([1, 100])
    """

    def __init__(self, config: BEHRTConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.behrt = BEHRT(config, generator=generator)
        with torch.random.fork_rng(devices=[]):
            self.head = MaskedLMHead(config)
        initialise(self.head, generator)

    def forward(
        self,
        codes: Tensor,
        ages: Tensor,
        visits: Tensor,
        attention_mask: Tensor | None = None,
        segments: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        scored: Tensor | None = None,
    ) -> Tensor:
        """Logits over the vocabulary, [batch, length, vocab_size]; with `scored` only where it is True.

        Args:
            scored: bool, [batch, length]. The head, most of a small model's work, is computed at these tokens only and
                the result is [number scored, vocab_size], in the order of `scored.nonzero()`.

        The other arguments, and what is raised, are those of `BEHRT.forward`.
        """
        hidden = self.behrt(codes, ages, visits, attention_mask, segments, positions=positions, scored=scored)
        if scored is None:
            logits: Tensor = self.head(hidden)
            return logits
        filling = missing_to_recur(len(hidden), 16, hidden.device)
        logits = self.head(F.pad(hidden, (0, 0, 0, filling)))
        return logits[: len(hidden)]


def compile_layers(model: nn.Module) -> None:
    """Has the layers of the encoder compiled when they are first called: one graph for all of them, of any length.

    Names and weights stay as they are. What is compiled is kept between processes by torch.
    """
    for module in model.modules():
        if isinstance(module, EncoderLayer):
            module.compile(dynamic=True)
