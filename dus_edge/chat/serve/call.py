"""One request to the server, as the code that runs the model for it sees it."""

from __future__ import annotations

import threading
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class Call:
    """A request.

    Attributes:
        prompt: its rendered conversation; empty of a plain completion.
        n_prompt: tokens of the prompt.
        wants_usage: whether a stream ends in a count of tokens.
        gone: set when nobody waits for the answer any more.
        n_tokens: tokens of the answer so far.
    """

    prompt: str = ""
    n_prompt: int = 0
    wants_usage: bool = False
    gone: threading.Event = field(default_factory=threading.Event)
    n_tokens: int = 0


#: The request that is being answered; servers carry it into their threads.
CURRENT: ContextVar[Call | None] = ContextVar("CURRENT", default=None)
