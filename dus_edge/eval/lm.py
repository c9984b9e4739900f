"""The harness's `LM` over our engines: every log-likelihood from a tree of shared prefixes.

Prompts and their tokens are those of lm-evaluation-harness' own `HFLM`
(lm_eval/models/huggingface.py): context and continuation are encoded together, spaces at the end of
a context belong to the continuation, and a prompt beyond the model's context loses its beginning.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from dus_edge.errors import UnsupportedError
from dus_edge.eval.record import AnswerRecord, scored_key, written_key
from dus_edge.machine import default_threads
from dus_edge.progress import Advance, progress
from dus_edge.run.llama import CacheType, load_model
from dus_edge.run.llama_text import LlamaText
from dus_edge.run.llama_tree import LlamaTree
from dus_edge.run.llama_writer import write_greedily
from dus_edge.run.source import SourceInfo
from dus_edge.run.torch_logits import load_network
from dus_edge.run.torch_tree import TorchTree
from dus_edge.run.tree import Limits, ScoredTokens, TreeStep, grow, tree_steps

#: What the harness gives `_loglikelihood_tokens`: texts, tokens of context and continuation.
Encoded = tuple[tuple[str, str] | None, list[int], list[int]]
LogLikelihood = tuple[float, bool]
#: Requests that are in memory at once: a token of a prompt takes some 40 bytes as Python's number,
#: and HellaSwag has 35 million. What parts share beyond their own requests is computed again.
MOST_REQUESTS = 8192


class TreeEngine(Protocol):
    """Computes steps of a tree."""

    def compute(self, step: TreeStep) -> np.ndarray:
        """Logits of the rows that the step reads, ``(n_read, vocab)``."""
        ...


class TreeLM(TemplateLM):
    """What both kinds of models share.

    Attributes:
        n_computed: tokens that ran through the model.
        n_cut: prompts that were longer than the model's context.
        title: of the progress that is shown.
    """

    record: AnswerRecord
    n_computed = 0
    n_cut = 0
    title = ""
    limits = Limits()

    def _engine(self, steps: Sequence[TreeStep]) -> AbstractContextManager[TreeEngine]:
        """An engine that can compute these steps."""
        raise NotImplementedError

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[LogLikelihood]:
        """See `lm_eval.api.model.LM`."""
        found: list[LogLikelihood] = []
        title, n_parts = self.title, -(-len(requests) // MOST_REQUESTS)
        for part in range(n_parts):
            if n_parts > 1:
                self.title = f"{title}, part {part + 1} of {n_parts}"
            own = requests[part * MOST_REQUESTS : (part + 1) * MOST_REQUESTS]
            found += super().loglikelihood(own, disable_tqdm=True)
        self.title = title
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """See `lm_eval.api.model.LM`."""
        windows: list[Encoded] = []
        counts = []
        for request in requests:
            found = [
                utils.make_disjoint_window(window)
                for window in utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            windows += [(None, *window) for window in found]
            counts.append(len(found))
        answers = iter(self._loglikelihood_tokens(windows))
        return [sum(next(answers)[0] for _ in range(n)) for n in counts]

    def _loglikelihood_tokens(
        self, requests: Sequence[Encoded], disable_tqdm: bool = True, **_: Any
    ) -> list[LogLikelihood]:
        asked = [self._scored(c, new) if new else None for _, c, new in requests]
        keys = [None if request is None else scored_key(request) for request in asked]
        new = {k: r for k, r in zip(keys, asked, strict=True) if k and r and k not in self.record}
        names, wanted = list(new), list(new.values())
        if wanted:
            steps = list(tree_steps(grow(wanted), self.limits))
            with (
                self._engine(steps) as engine,
                progress(self.title, sum(len(s.tree.tokens) for s in steps), unit="tokens") as told,
            ):
                for group in score_tree(engine, steps, wanted, told):
                    self.record.add((names[i], answer) for i, answer in group)
            self.n_computed += sum(len(s.tree.tokens) for s in steps)
        # No tokens at all are certain.
        answers = (self.record[key] if key else (0.0, True) for key in keys)
        return [(float(a), bool(b)) for a, b in answers]

    def _scored(self, context: list[int], continuation: list[int]) -> ScoredTokens:
        tokens = (context + continuation)[-(self.max_length + 1) :]
        self.n_cut += len(tokens) < len(context) + len(continuation)
        return ScoredTokens(tuple(tokens), max(1, len(tokens) - len(continuation)))


def score_tree(
    engine: TreeEngine, steps: Iterable[TreeStep], requests: Sequence[ScoredTokens], told: Advance
) -> Iterator[list[tuple[int, LogLikelihood]]]:
    """Log-likelihoods, in nats, and whether each token was the likeliest, as they are complete.

    Args:
        engine: computes the steps.
        steps: of the tree of `requests`.
        requests: whose continuations are scored.
        told: of the tokens done.

    Yields:
        After each step, (number of the request, answer) of those that it completed.
    """
    missing = np.array([len(r.tokens) - r.n_context for r in requests])
    sums, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
    for step in steps:
        logits = engine.compute(step)
        done = []
        for row, wanted in enumerate(step.tree.wanted):
            values = logits[row]
            best = int(values.argmax())
            top = float(values[best])
            total = top + float(np.log(np.exp(values - values[best]).sum(dtype=np.float64)))
            for request, token in wanted:
                sums[request] += float(values[token]) - total
                greedy[request] &= token == best
                missing[request] -= 1
                if not missing[request]:
                    done.append((request, (float(sums[request]), bool(greedy[request]))))
        yield done
        told(len(step.tree.tokens))


class FolderLM(TreeLM, HFLM):
    """A checkpoint folder in float32; texts are written by the harness's own `HFLM`.

    Args:
        info: of the folder.
        record: of answers.
        device: of torch.
        n_threads: of the CPU; None for all cores.
    """

    def __init__(
        self, info: SourceInfo, record: AnswerRecord, device: str, n_threads: int | None
    ) -> None:
        from transformers import AutoTokenizer

        from dus_edge.run.folders import NO_CODE, hushed

        with hushed():
            tokenizer = AutoTokenizer.from_pretrained(info.path, **NO_CODE)
        tokenizer.model_max_length = 1 << 30  # prompts are cut here, and counted
        model = load_network(info, device, n_threads)[0]
        HFLM.__init__(
            self,
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=4,
            max_length=info.context_length or None,
        )
        self.info, self.record = info, record

    @contextmanager
    def _engine(self, steps: Sequence[TreeStep]) -> Iterator[TreeEngine]:
        yield TorchTree(self.model, self.info.path)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """See `lm_eval.api.model.LM`."""
        keys = [written_key(self.tok_encode(r.args[0]), r.args[1]) for r in requests]
        new = [(k, r) for k, r in zip(keys, requests, strict=True) if k not in self.record]
        with progress(self.title, len(new), unit="texts") as told:
            for i in range(0, len(new), int(self.batch_size)):
                part = new[i : i + int(self.batch_size)]
                texts = HFLM.generate_until(self, [r for _, r in part], disable_tqdm=True)
                self.record.add(zip((k for k, _ in part), texts, strict=True))
                told(len(part))
        return [self.record[key] for key in keys]


class LlamaLM(TreeLM):
    """A GGUF file through llama.cpp.

    Args:
        info: of the file.
        record: of answers.
        device: ``cpu``, or anything else for llama.cpp's GPU.
        n_threads: of the CPU; None for all cores.
        cache: type of keys and values.
    """

    def __init__(
        self,
        info: SourceInfo,
        record: AnswerRecord,
        device: str,
        n_threads: int | None,
        cache: CacheType,
    ) -> None:
        super().__init__()
        self.info, self.record = info, record
        self._cache, self._n_threads = cache, n_threads or default_threads()
        self._stack = ExitStack()
        layers = 0 if device == "cpu" else -1
        self._model = self._stack.enter_context(load_model(info.path, n_gpu_layers=layers))
        self._text = LlamaText(self._model, info.path)
        bos = self._text.bos_id
        self._bos_text = None if bos is None else self._text.decode([bos], special=True)
        self._encoded: tuple[str, list[int]] | None = None

    def close(self) -> None:
        """Free the model."""
        self._stack.close()

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        eos = self._text.eos_id
        return self.prefix_token_id if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context."""
        for token in (self._text.bos_id, self._text.eos_id):
            if token is not None:
                return token
        raise UnsupportedError(
            f"{self.info.path} names neither a first nor a last token, so a text without context "
            "cannot be scored; export the file with its base's tokenizer."
        )

    @property
    def max_length(self) -> int:
        """Tokens of the model's context."""
        return self.info.context_length or 2048

    @property
    def max_gen_toks(self) -> int:
        """Tokens that are written where a task does not say."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells prompts apart by."""
        return str(self.info.path)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids, with what the tokenizer adds unless it is there already."""
        if add_special_tokens is None:
            # The choices of a question come one after the other.
            if self._encoded is not None and self._encoded[0] == string:
                return self._encoded[1]
            special = not has_bos_prefix(string, self._bos_text)
            self._encoded = (string, self._text.encode(string, special=special))
            return self._encoded[1]
        return self._text.encode(string, special=add_special_tokens)

    @contextmanager
    def _engine(self, steps: Sequence[TreeStep]) -> Iterator[TreeEngine]:
        with LlamaTree(
            self._model,
            self.info.path,
            steps=steps,
            n_threads=self._n_threads,
            cache=self._cache,
        ) as engine:
            yield engine

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """See `lm_eval.api.model.LM`.

        Raises:
            UnsupportedError: a task wants samples rather than the likeliest text.
        """
        prompts = [self.tok_encode(r.args[0]) for r in requests]
        keys = [written_key(p, r.args[1]) for p, r in zip(prompts, requests, strict=True)]
        groups: dict[str, list[int]] = {}
        for i, key in enumerate(keys):
            if key not in self.record:
                groups.setdefault(repr(requests[i].args[1]), []).append(i)
        with progress(self.title, sum(map(len, groups.values())), unit="texts") as told:
            for numbers in groups.values():
                self._write(numbers, prompts, keys, requests[numbers[0]].args[1], told)
        return [self.record[key] for key in keys]

    def _write(
        self,
        numbers: Sequence[int],
        prompts: Sequence[list[int]],
        keys: Sequence[str],
        asked: dict[str, Any],
        told: Advance,
    ) -> None:
        """LogLikelihood prompts that ask for the same kind of text."""
        how = normalize_gen_kwargs(asked, self.max_gen_toks)
        if how.get("do_sample"):
            raise UnsupportedError(
                "the task wants texts that are drawn at random, which GGUF files are not asked "
                "for here; evaluate a folder."
            )
        end = self._text.decode([self.eot_token_id], special=True)
        stops = handle_stop_sequences(how["until"], end)
        n_new = int(how["max_gen_toks"])
        room = self.max_length - n_new
        asked_for = [prompts[i][-room:] for i in numbers]
        self.n_cut += sum(len(prompts[i]) > room for i in numbers)
        # Long ones first, as the harness does: the time left is then never too short.
        order = sorted(range(len(numbers)), key=lambda i: -len(asked_for[i]))

        def finished(written: list[int]) -> bool:
            tail = self._text.decode(written[-32:], special=True)
            return any(stop and stop in tail for stop in stops)

        for place, written in write_greedily(
            self._model,
            self.info.path,
            [asked_for[i] for i in order],
            n_new=n_new,
            finished=finished,
            n_threads=self._n_threads,
            cache=self._cache,
        ):
            i = numbers[order[place]]
            text = postprocess_generated_text(self._text.decode(written), stops, None)
            self.record.add([(keys[i], text)])
            self.n_computed += len(asked_for[order[place]]) + len(written)
            told(1)
