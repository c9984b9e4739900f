"""Packages that talk on standard error are asked not to."""

from __future__ import annotations

import logging
import os


def be_quiet() -> None:
    """Packages that talk on standard error: our own lines and progress say what is needed.

    To be called before any of them is imported: some talk while they are.
    """
    for name in ("trl", "peft", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ["TQDM_DISABLE"] = "1"
    import datasets
    import transformers
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
