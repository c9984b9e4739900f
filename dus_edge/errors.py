"""The errors a user can meet, one tree; each says what is wrong, where, and what to do.

A message is one sentence that names the file and the tensor or field. The command line
prints it without a traceback and exits with the class's `exit_code`.
"""

#: Characters of a message. A name or value in it may come from anybody's file, at any length.
MOST_MESSAGE = 2000


class DusEdgeError(Exception):
    """Base of every error that is the input's or the machine's, not a bug of ours."""

    exit_code = 1

    def __str__(self) -> str:
        """The message as one line, without its middle where it is too long."""
        text = super().__str__().replace("\r", "\\r").replace("\n", "\\n")
        if len(text) > MOST_MESSAGE:
            half = MOST_MESSAGE // 2
            text = f"{text[: half - 1]}…{text[-half:]}"
        return text


class UsageError(DusEdgeError):
    """An option's value cannot be used (unknown preset, m out of range, bad plan)."""

    exit_code = 2


class CheckpointError(DusEdgeError):
    """The source checkpoint is damaged, incomplete or inconsistent."""

    exit_code = 3


class UnsupportedError(CheckpointError):
    """The source is sound, but of a kind this program does not know."""


class OutputError(DusEdgeError):
    """An output cannot be written: it exists, the folder refuses, the disk is full."""

    exit_code = 4


class DependencyError(DusEdgeError):
    """An optional package is needed for this step and is not installed."""

    exit_code = 5
