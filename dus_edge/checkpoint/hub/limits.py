"""How much a hub may send, and for how long: what it says of sizes is not believed either.

The hub client reads an answer whole, whatever its length, and waits for as long as a byte comes
now and then. Here each answer is counted as it comes in, and each small file has its time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dus_edge.words import format_bytes

#: An answer of the hub's API: a repository of 100,000 files stays below it.
ANSWER_BYTES = 64 << 20
ANSWER_SECONDS = 60
#: A small file, on a slow line; the largest tokenizers have 35 MB.
SMALL_FILE_SECONDS = 900


class _Limit:
    """Bytes that one answer may have; none while nothing is asked for."""

    nbytes: int | None = None


_limit = _Limit()


@contextmanager
def answer_limit(nbytes: int | None) -> Iterator[None]:
    """Within it no answer may have more bytes; None: no limit.

    Raises:
        ValueError: one had, from within the client.
    """
    _watch_client()
    before, _limit.nbytes = _limit.nbytes, nbytes
    try:
        yield
    finally:
        _limit.nbytes = before


def check_answer(info: object) -> None:
    """See that what the client made of an answer of the API has the types it says.

    Args:
        info: the hub client's ``ModelInfo``.

    Raises:
        ValueError: it has not; the message is a clause.
    """
    files = getattr(info, "siblings", None) or ()
    for file in files:
        name, size = file.rfilename, file.size
        if not isinstance(name, str):
            raise ValueError(f"a file is called {name!r}"[:80])
        if size is not None and (type(size) is not int or not 0 <= size < 1 << 63):
            raise ValueError(f"the size of {name[:80]!r} is {size!r}"[:160])
    if not isinstance(getattr(info, "sha", None), str | None):
        raise ValueError("its commit is no text")


def _watch_client() -> None:
    """Have the client's answers counted; once for the process, for it may make clients anew."""
    from huggingface_hub import get_session, set_client_factory

    if _watched in get_session().event_hooks["response"]:
        return
    model = get_session()
    set_client_factory(_factory(type(model), model.event_hooks, model.follow_redirects))


def _factory(kind: type[Any], hooks: dict[str, list[Any]], redirects: bool) -> Callable[[], Any]:
    hooks = {"request": list(hooks["request"]), "response": [*hooks["response"], _watched]}

    def make() -> Any:
        # Packed answers would be counted packed; the hub sends them plain when it is asked to.
        headers = {"Accept-Encoding": "identity"}
        return kind(event_hooks=hooks, follow_redirects=redirects, timeout=None, headers=headers)

    return make


def _watched(response: Any) -> None:
    """The client's hook between an answer's head and its body."""
    if _limit.nbytes is None:
        return
    packing = response.headers.get("Content-Encoding", "identity")
    if packing != "identity":
        raise ValueError(f"the answer is packed ({packing[:20]!r}) although that was not asked for")
    response.stream = _counted(type(response.stream), response.stream, _limit.nbytes)


def _counted(kind: type[Any], stream: Any, nbytes: int) -> Any:
    """A stream of the same kind, which ends in an error beyond so many bytes."""

    class Counted(kind):  # type: ignore[misc]
        def __init__(self) -> None:
            self.taken = 0

        def __iter__(self) -> Iterator[bytes]:
            for part in stream:
                self.taken += len(part)
                if self.taken > nbytes:
                    raise ValueError(f"it sends more than {format_bytes(nbytes)}")
                yield part

        def close(self) -> None:
            stream.close()

    return Counted()
