"""Two tokenizers in one folder that are not the same: said, not passed over."""

from __future__ import annotations

import json

from dus_edge.export.vocab.vocab import read_vocab


def test_tokenizers_of_two_vocabularies_are_said(run, make_checkpoint, tmp_path):
    base = make_checkpoint()
    assert not any("disagree" in note for note in read_vocab(base, 4096).notes)
    path = base / "tokenizer.json"
    parsed = json.loads(path.read_text())
    vocab = parsed["model"]["vocab"]
    first, second = (next(t for t, i in vocab.items() if i == n) for n in (1000, 1001))
    vocab[first], vocab[second] = 1001, 1000
    path.write_text(json.dumps(parsed))
    notes = [note for note in read_vocab(base, 4096).notes if "disagree" in note]
    assert len(notes) == 1
    assert f"disagree on 2 tokens: 1000 is {first!r} in the one and {second!r}" in notes[0]
    code, out, _ = run("gguf", base, "-q", "q8_0", "-o", tmp_path / "out")
    assert code == 0 and "disagree on 2 tokens" in " ".join(out.split())
