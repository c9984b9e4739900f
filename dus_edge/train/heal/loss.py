"""Cross-entropy by chunks of tokens: the logits of a whole batch are never in memory.

A vocabulary of 49,152 tokens makes 200 KB of float32 logits a token, and the gradient as much
again. Here each chunk's logits become their own gradient at once, in the forward pass, so the head
is multiplied three times per token as without chunks, and nothing is computed twice (the idea of
the fused linear cross-entropy of Liger Kernel, arXiv:2410.10989, in plain PyTorch).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from dus_edge.train.packing.batches import NO_LABEL

#: Tokens whose logits are in memory at a time.
CHUNK_TOKENS = 512


def chunked_cross_entropy(
    hidden: torch.Tensor,
    head: torch.Tensor,
    labels: torch.Tensor,
    teacher: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of cross-entropy in nats.

    Args:
        hidden: ``(n_tokens, width)`` final hidden states, normed.
        head: ``(vocabulary, width)``.
        labels: ``(n_tokens,)`` int64; `NO_LABEL` counts nothing.
        teacher: hidden states and head of a teacher, and the share in 0…1 that its distribution
            has in the target; the rest is the label's.

    Returns:
        the sum to be minimized, float32 scalar: against labels, or against the mixture with the
        teacher; and the sum against labels alone, without gradient.
    """
    if teacher is None:
        total, plain = _ChunkedLoss.apply(hidden, head, labels, None, None, 0.0)
    else:
        total, plain = _ChunkedLoss.apply(hidden, head, labels, *teacher)
    return total, plain


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradients in one pass; see `chunked_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        labels: torch.Tensor,
        teacher_hidden: torch.Tensor | None,
        teacher_head: torch.Tensor | None,
        share: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        d_hidden = torch.zeros_like(hidden) if wants_hidden else None
        # Summed in float32: hundreds of chunks add up here.
        d_head = torch.zeros_like(head, dtype=torch.float32) if wants_head else None
        total = hidden.new_zeros((), dtype=torch.float32)
        plain = hidden.new_zeros((), dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], CHUNK_TOKENS):
                part = slice(start, start + CHUNK_TOKENS)
                states, wanted = hidden[part], labels[part]
                logits = (states @ head.to(states.dtype).T).float()
                found = F.cross_entropy(logits, wanted, ignore_index=NO_LABEL, reduction="sum")
                plain += found
                soft = None
                if teacher_hidden is not None and teacher_head is not None:
                    soft = _teacher_probabilities(teacher_hidden[part], teacher_head)
                    against = -(soft * F.log_softmax(logits, dim=-1)).sum(-1)
                    total += (1 - share) * found + share * against[wanted != NO_LABEL].sum()
                else:
                    total += found
                if wants_hidden or wants_head:
                    slope = _slope(logits, wanted, soft, share).to(states.dtype)
                    if d_hidden is not None:
                        d_hidden[part] = slope @ head.to(states.dtype)
                    if d_head is not None:
                        d_head += (slope.T @ states).float()
        ctx.save_for_backward(d_hidden, d_head)
        ctx.head_dtype = head.dtype
        ctx.mark_non_differentiable(plain)
        return total, plain

    @staticmethod
    def backward(ctx: Any, d_total: torch.Tensor, d_plain: torch.Tensor) -> tuple[Any, ...]:
        d_hidden, d_head = ctx.saved_tensors
        return (
            None if d_hidden is None else d_hidden * d_total.to(d_hidden.dtype),
            None if d_head is None else (d_head * d_total).to(ctx.head_dtype),
            *(None,) * 4,
        )


def _teacher_probabilities(states: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    return (states @ head.to(states.dtype).T).float().softmax(-1)


def _slope(
    logits: torch.Tensor, labels: torch.Tensor, soft: torch.Tensor | None, share: float
) -> torch.Tensor:
    """Gradient of the summed loss by the logits; overwrites them."""
    slope = torch.softmax(logits, dim=-1, out=logits)
    counted = labels != NO_LABEL
    rows = counted.nonzero()[:, 0]
    if soft is not None:
        slope.sub_(soft, alpha=share)
    slope[rows, labels[rows]] -= 1 - share
    slope[~counted] = 0
    return slope
