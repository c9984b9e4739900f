"""What the hub client raises, as one sentence."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from dus_edge.errors import CheckpointError, DusEdgeError, OutputError, UsageError

#: Kinds of repositories.
MODEL, DATASET = "model", "dataset"
_NOT_THE_HUBS = (AttributeError, KeyError, TypeError)


class Unreachable(DusEdgeError):
    """No answer from the hub; the message is a clause without its full stop."""


@contextmanager
def hub_explained(
    repo: str, revision: str | None, file: str | None, kind: str = MODEL
) -> Iterator[None]:
    """Turn what the hub client raises into one sentence.

    With no file (the first question to the hub) a hub that does not answer is `Unreachable`,
    so that the cache can be tried; later it is the download that broke off.
    """
    # The client's transport errors are httpx's or httpx2's, depending on its version.
    from huggingface_hub.errors import HfHubHTTPError

    transport = next(c for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError")
    try:
        yield
    # RuntimeError is what the client's compiled transfer back end raises; the rest is what becomes
    # of an answer of other types than the hub's.
    except (transport, OSError, ValueError, RuntimeError, *_NOT_THE_HUBS) as e:
        raise _explain(e, repo, revision, file, kind) from e


def _explain(
    e: BaseException, repo: str, revision: str | None, file: str | None, kind: str
) -> DusEdgeError:
    from huggingface_hub import constants, errors

    cause: BaseException | None = e
    if isinstance(e, errors.LocalEntryNotFoundError) and e.__cause__ is not None:
        cause = e.__cause__  # the client's wrapping says less than what it wraps
    status = getattr(getattr(cause, "response", None), "status_code", 0)
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == DATASET else ''}{repo}"
    match cause:
        case errors.GatedRepoError():
            return DusEdgeError(
                f"{repo} is gated: accept its licence on {page} and set HF_TOKEN to a token of "
                "the account that did."
            )
        case errors.RepositoryNotFoundError():
            return UsageError(
                f"The hub has no {kind} {repo}, or it is private: check the spelling, or set "
                "HF_TOKEN to a token that may read it."
            )
        case errors.RevisionNotFoundError():
            return UsageError(
                f"{repo} has no revision {revision}; its branches and tags are on {page}/tree/main."
            )
        case errors.OfflineModeIsEnabled():
            return Unreachable("HF_HUB_OFFLINE is set")
    if status in (401, 403):
        return DusEdgeError(f"The hub refuses access to {repo} ({status}): check HF_TOKEN.")
    if status == 404:
        return CheckpointError(f"The hub has no {file or repo} at {page} (404).")
    number = getattr(cause, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"The disk of the hub cache is full; {file or repo} does not fit.")
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        place = getattr(cause, "filename", None) or "the hub cache"
        return OutputError(f"{place} cannot be written ({os.strerror(number)}).")
    reason = f"HTTP status {status}" if status else _first_line(cause)
    if file is not None:
        return DusEdgeError(
            f"The download of {file} from {repo} broke off ({reason}); finished files are kept, "
            "run the same command again to go on."
        )
    if isinstance(cause, (ValueError, RecursionError, *_NOT_THE_HUBS)):
        reason = f"its answer is not the hub's: {reason}"
    return Unreachable(f"The hub at {constants.ENDPOINT} cannot be reached ({reason})")


def _first_line(e: BaseException | None) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0].rstrip(".")
