"""What an exported model is called: its parts, its title, and its GGUF file name.

Convention: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#gguf-naming-convention,
``<BaseName>-<SizeLabel>-<FineTune>-<Version>-<Encoding>.gguf``.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from dus_edge.quant.recipe import Preset

#: What the convention assumes of a model that does not say its version.
DEFAULT_VERSION = "v1.0"
#: Bytes of a base's name at most: with size, version, type and the ending of a partial file a name
#: stays below the 255 that file systems take.
_MOST_BYTES = 96


@dataclass(frozen=True)
class ModelName:
    """The convention's parts.

    Attributes:
        base: family name, e.g. ``Mistral`` or ``Mistral-DUS``.
        size: parameter count as a label, e.g. ``10.7B``.
        finetune: e.g. ``Instruct``, or None for a base model.
        version: e.g. ``v0.1``.
    """

    base: str
    size: str
    finetune: str | None
    version: str

    @property
    def parts(self) -> list[str]:
        """The parts that are there, in the convention's order."""
        return [p for p in (self.base, self.size, self.finetune, self.version) if p]

    @property
    def title(self) -> str:
        """A name for people, e.g. ``Mistral DUS 10.7B v0.1``."""
        return " ".join(p.replace("-", " ") for p in self.parts)

    @property
    def stem(self) -> str:
        """File name without type and ending, e.g. ``Mistral-DUS-10.7B-v0.1``."""
        return "-".join(self.parts)

    def file_name(self, preset: Preset) -> str:
        """E.g. ``Mistral-DUS-10.7B-v0.1-Q4_K_M.gguf``."""
        return f"{self.stem}-{preset.label}.gguf"


def size_label(n_parameters: int) -> str:
    """Parameter count to three digits: ``10.7B``, ``8.14M``."""
    value, suffix = float(n_parameters), ""
    for suffix in ("", "K", "M", "B", "T"):
        if value < 999.5 or suffix == "T":
            break
        value /= 1000
    digits = max(0, 3 - len(str(int(value))))
    return f"{value:.{digits}f}{suffix}"


def name_model(source_name: str, n_parameters: int, *, upscaled: bool) -> ModelName:
    """Take a source's name apart and name the export.

    Args:
        source_name: e.g. ``Mistral-7B-v0.1``, a folder's or a hub repository's name.
        n_parameters: of the exported model.
        upscaled: whether its depth differs from the source's.
    """
    import gguf

    plain = re.sub(r"[^\w.-]+", "-", unicodedata.normalize("NFC", source_name)).strip("-.")
    _, _, base, finetune, version, label = gguf.Metadata.get_model_id_components(
        plain, n_parameters
    )
    base = _shortened(_clean(base or plain) or "model", _MOST_BYTES)
    finetune = _shortened(_clean(finetune), _MOST_BYTES // 2) or None
    version = _shortened(_clean(version), _MOST_BYTES // 4) or DEFAULT_VERSION
    if not upscaled:
        return ModelName(base, _clean(label) or size_label(n_parameters), finetune, version)
    base = base if base.upper().endswith("-DUS") else f"{base}-DUS"
    return ModelName(base, size_label(n_parameters), finetune, version)


def _shortened(text: str, most: int) -> str:
    """A name of at most so many bytes of UTF-8, whole characters."""
    return text.encode()[:most].decode(errors="ignore").strip("-.")


def _clean(text: str | None) -> str:
    """A name without what file systems, shells and Modelfiles trip over; letters stay letters."""
    kept = re.sub(r"[^\w.]+|_+", "-", unicodedata.normalize("NFC", text or ""))
    return kept.strip("-.")
