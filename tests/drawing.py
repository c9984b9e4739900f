"""Not of the suite: what `test_draws` runs in processes of its own, to see what is drawn there."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from .draws import examples

# Hypothesis would read the constants in the sources of these too.
for name in os.environ["DRAWS_IMPORT"].split():
    importlib.import_module(name)


@examples(60)
@given(st.integers(), st.floats(), st.text())
def test_draw(whole, real, text):
    with Path(os.environ["DRAWS_FILE"]).open("a") as f:
        print(json.dumps(list(map(repr, (whole, real, text)))), file=f)
