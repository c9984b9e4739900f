"""Gradients of one step by a few single-threaded workers that share a queue.

Splitting every matrix product over the cores makes each product as slow as the busiest core.
Workers which take whole micro-batches from one queue lose little on a machine that others
use too, and small micro-batches stay in each core's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue

import torch
from torch import Tensor
from torch.nn import functional as F

from dus_edge.train.pico.model import Pico

GradientJob = tuple[Tensor, Sequence[int] | None]
"""Int64 ids (rows, length + 1) and the plan of layers through which to run them."""


def mean_loss(model: Pico, ids: Tensor, plan: Sequence[int] | None) -> Tensor:
    """Return the mean cross entropy in nats/token, a scalar f32 tensor."""
    logits = model(ids[:, :-1], plan)
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def make_pool(workers: int) -> ThreadPoolExecutor:
    """Start threads that each compute with one core."""
    return ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))


def _drain(model: Pico, queue: SimpleQueue, weight: float) -> tuple[list[Tensor], list]:
    """Take jobs until none is left; return summed gradients and (is plain, nats) pairs."""
    params = list(model.parameters())
    total = [torch.zeros_like(param) for param in params]
    losses = []
    while True:
        try:
            ids, plan = queue.get_nowait()
        except Empty:
            return total, losses
        with torch.enable_grad():
            loss = mean_loss(model, ids, plan)
            grads = torch.autograd.grad(loss, params)
        torch._foreach_add_(total, grads, alpha=weight)
        losses.append((plan is None, loss.item()))


def accumulate(
    model: Pico, jobs: Sequence[GradientJob], pool: ThreadPoolExecutor, workers: int
) -> list[tuple[bool, float]]:
    """Set every parameter's ``grad`` to the mean over the jobs; return (is plain, nats)."""
    queue: SimpleQueue = SimpleQueue()
    for job in jobs:
        queue.put(job)
    futures = [pool.submit(_drain, model, queue, 1 / len(jobs)) for _ in range(workers)]
    results = [future.result() for future in futures]
    total = results[0][0]
    for grads, _ in results[1:]:
        torch._foreach_add_(total, grads)
    for param, grad in zip(model.parameters(), total, strict=True):
        param.grad = grad
    return [pair for _, losses in results for pair in losses]
