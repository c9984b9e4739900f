"""Which tensors a training step of a Llama keeps between forward and backward, term by term.

Read from `LlamaForCausalLM` of transformers 5.23 with attention by sdpa. T are tokens of a
micro-batch, d the hidden size, f the feed-forward's, v bytes of a computed value.

- A norm computes in f32. If a gradient flows to its input it saves the input in f32 (4Td; in an f32
  model that is the residual stream itself) and 1/rms (4T); if its weight is trained, the normed
  input (vTd).
- A linear layer saves its input if its weight is trained or an adapter reads it; q, k and v share
  theirs, gate and up theirs. An adapter of another precision than the model's saves a copy of its
  own in that precision, each of them. Every adapter saves its r values.
- sdpa saves queries, keys, values, its result and a log-sum-exp of each head (4T). With a mask
  (documents packed into a sequence) keys and values are repeated for all query heads, and each
  layer saves the mask as values of its own (v × sequence² for every sequence).
- Under autocast norms of f32 weights give f32, of which every linear layer saves a bf16 copy; the
  residual stream is f32 if the embedding is trained, which is f32 then.
- The feed-forward saves gate, silu(gate) and up, and their product as the input of down.
- A frozen layer below everything trained saves nothing; one above saves what the gradient needs to
  pass, but no inputs of linear layers. A checkpointed layer saves its input (vTd) alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from dus_edge.checkpoint.config import ModelConfig
from dus_edge.predict.training.work import COMPUTE_BYTES, TrainingWork

_F32 = 4
#: What a layer is to the backward pass: out of its way, passed by it, trained, or with adapters.
OUT, PASSED, TRAINED, ADAPTED = "out", "passed", "trained", "adapted"
_LINEAR_AFTER_NORM = (3, 2)  # q, k, v; gate, up


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes of the tensors of a step, by where they are made.

    Attributes:
        work: what is trained, and how.
        config: the model's.
    """

    config: ModelConfig
    work: TrainingWork

    @property
    def row(self) -> int:
        """One value for each channel of the residual stream: vTd, under autocast 4Td."""
        return self.work.tokens * self.config.hidden_size * self._stream

    @property
    def wide(self) -> int:
        """One value for each channel of the feed-forward network: vTf."""
        return self.work.tokens * self.config.intermediate_size * self._value

    def kind(self, layer: int) -> str:
        """What a layer is to the backward pass."""
        work = self.work
        if work.lora_rank:
            return ADAPTED
        if work.layers is None or layer in work.layers:
            return TRAINED
        return PASSED if self._reached(layer) else OUT

    def input_learns(self, layer: int) -> bool:
        """Whether a gradient flows to a layer's input, or for the last norm, whose number is n."""
        if self.work.lora_rank:
            return layer > 0
        return self.work.ends or self._lowest() < layer

    def saved(self, layer: int) -> int:
        """Bytes that a layer saves without checkpointing."""
        kind = self.kind(layer)
        if kind == OUT:
            return 0
        config, work, v = self.config, self.work, self._value
        t = work.tokens
        total = 0
        # The norm before the feed-forward always has a gradient to pass.
        for learns, readers in zip(
            (self.input_learns(layer), True), _LINEAR_AFTER_NORM, strict=True
        ):
            total += self._norm(learns=learns, trained=kind == TRAINED)
            total += self._inputs(kind, config.hidden_size, readers)
        q, kv = config.q_width, config.kv_width
        total += t * v * (2 * q + 2 * (q if work.packed else kv)) + t * config.n_heads * _F32
        if work.packed:
            total += self._mask_values
        if kind == ADAPTED and self._copies_inputs:  # else o_proj reads sdpa's own result
            total += t * q * self._adapter
        total += 3 * self.wide + self._inputs(kind, config.intermediate_size, 1)
        if kind == ADAPTED:
            total += 7 * t * work.lora_rank * self._adapter
        return total

    def kept(self, layer: int) -> int:
        """Bytes that a layer keeps until its backward pass: its input alone if checkpointed."""
        if self.kind(layer) == OUT:
            return 0
        return self.row if self.work.checkpointing else self.saved(layer)

    def backward_extra(self, layer: int) -> int:
        """Bytes that a layer's backward pass has at its peak beside all that the layer saved.

        That is in the feed-forward network: the gradient of the layer's result, and those of the
        product, of up and of silu(gate) at once, when the saved product has been dropped. A
        checkpointed layer has its input beside, unless that is what its first norm saves.
        """
        kind = self.kind(layer)
        extra = self.row + 3 * self.wide - self._inputs(kind, self.config.intermediate_size, 1)
        if kind == ADAPTED and self._copies_inputs:
            # While up is computed again its adapter's result, that scaled, and their sum are there
            # in the adapter's precision, when down's input is not yet.
            size = _F32 / self._value
            extra = max(extra, self.row + int(2 * size * (self.wide + self.row)))
        if self.work.quantized:
            # bitsandbytes brings a matrix to the precision of computing before it multiplies.
            extra += self.config.intermediate_size * self.config.hidden_size * self._value
        if self.work.checkpointing and not (self._stream == _F32 and self.input_learns(layer)):
            extra += self.row
        return extra

    def held(self) -> int:
        """Bytes that the loop holds while layers run backward: logits of transformers' loss."""
        if self.work.chunk is None:
            return self.work.tokens * self.config.vocab_size * self._value
        return 0

    def forward_extra(self) -> int:
        """Bytes that a layer which saves nothing has at its peak: its residual, and three wide."""
        return 2 * self.row + 3 * self.wide

    def before_layers(self) -> int:
        """Cosines, sines, positions, tokens; for checkpointed layers the mask, bytes, as well."""
        t, work = self.work.tokens, self.work
        mask = work.batch * work.sequence**2 if work.packed and work.checkpointing else 0
        return 2 * self.work.sequence * self.config.head_dim * self._value + 3 * t * 8 + mask

    def last_norm(self) -> int:
        """Bytes that the norm before the head saves, with its result."""
        norm = self._norm(learns=True, trained=self.work.ends)
        return norm + self.row

    def head(self) -> int:
        """Bytes of logits and what is made of them at the peak of the loss.

        In chunks: f32 logits and their log-probabilities, and the gradient of the hidden states.
        By transformers' own loss, in its backward pass: log-probabilities, their gradient and that
        of the logits, in f32, and the logits that it returns.
        """
        work, vocab = self.work, self.config.vocab_size
        if work.chunk is None:
            return work.tokens * vocab * (3 * _F32 + self._value)
        return min(work.chunk, work.tokens) * vocab * 2 * _F32 + self._hidden

    def head_gradient(self) -> int:
        """Bytes beside the head's gradient while a chunk's own is made to be added to it."""
        v = self._value
        vocab, chunk = self.config.vocab_size, min(self.work.chunk or 0, self.work.tokens)
        made = vocab * self.config.hidden_size * (_F32 + (v if v < _F32 else 0))
        return made + chunk * vocab * (_F32 + (v if v < _F32 else 0)) + self._hidden

    @property
    def _hidden(self) -> int:
        return self.work.tokens * self.config.hidden_size * self._value

    @property
    def _value(self) -> int:
        return COMPUTE_BYTES[self.work.precision]

    @property
    def _stream(self) -> int:
        """Bytes of a value between layers: under autocast of the embedding's, f32 if trained."""
        work = self.work
        learns = work.ends and not work.lora_rank
        return _F32 if work.precision == "mixed" and learns else self._value

    @property
    def _adapter(self) -> int:
        """Bytes of a value that an adapter computes with; autocast makes f32 ones bf16 too."""
        if self.work.precision == "mixed":
            return self._value
        return {"f32": 4, "bf16": 2}[self.work.adapter_precision]

    @property
    def _copies_inputs(self) -> bool:
        """Whether every adapter keeps a copy of its input: peft brings it to its own precision."""
        kept = {"f32": 4, "bf16": 2}[self.work.adapter_precision]
        return bool(self.work.lora_rank) and kept != self._value

    @property
    def _mask_values(self) -> int:
        return self.work.batch * self.work.sequence**2 * self._value

    def _lowest(self) -> int:
        """The lowest layer that is trained; above the last if none is."""
        layers = self.work.layers
        if layers is None:
            return 0
        return min(layers, default=self.config.n_layers)

    def _reached(self, layer: int) -> bool:
        return self.work.ends or layer > self._lowest()

    def _norm(self, *, learns: bool, trained: bool) -> int:
        t, d = self.work.tokens, self.config.hidden_size
        passed = t * (d + 1) * _F32 if learns else 0
        return passed + (t * d * self._stream if trained else 0)

    def _inputs(self, kind: str, width: int, readers: int) -> int:
        """What linear layers save of an input that they share."""
        t = self.work.tokens
        if kind == ADAPTED and self._copies_inputs:
            return readers * t * width * self._adapter
        if kind not in (TRAINED, ADAPTED):
            return 0
        # The f32 weight of a norm makes an f32 result, which autocast copies for every reader.
        copies = readers if self.work.precision == "mixed" and kind == TRAINED else 1
        return copies * t * width * self._value
