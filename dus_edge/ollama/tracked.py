"""The Modelfiles that the repository keeps in `modelfiles/`, one per preset and two more."""

from dus_edge.ollama import chat
from dus_edge.ollama.modelfile import (
    completion_spec,
    instruct_spec,
    render_modelfile,
)
from dus_edge.quant.imatrix import DEPENDENT
from dus_edge.quant.recipe import PRESETS


def tracked_modelfiles() -> dict[str, str]:
    """The texts of the repository's `modelfiles/` by file name.

    They run whatever base the GGUFs in `build/` were made from, so they name neither a
    licence nor a base, and no `num_ctx`: bases have from 512 tokens (pico) to 131,072. Ollama
    then takes 4,096 on devices below 23 GiB and more on larger ones, never more than the GGUF's
    own (`server/routes.go`, `sched.go`, source of 2026-08-21).
    """
    common = (
        "num_ctx: left to Ollama, which takes OLLAMA_CONTEXT_LENGTH, or a length that suits the"
        " device's memory, and never more than the model's own. The Modelfile beside the GGUF"
        " sets it, also for a base with a sliding window, which Ollama does not heed.",
        "Licence: that of the base checkpoint. `dus-edge modelfile` writes a Modelfile that"
        " states it.",
    )

    def create(name: str, preset: str | None = None) -> str:
        make = f"make gguf QUANT={preset}" if preset else "make gguf"
        if preset and PRESETS[preset].default in DEPENDENT:
            make += " IMATRIX=auto"
        return (
            f'Make the GGUF first: {make}; without it Ollama says "invalid model name". Then:'
            f" ollama create {name.replace('solar', 'solar-dus', 1)} -f modelfiles/{name}"
        )

    def completion(name: str, gguf: str, title: str, preset: str | None = None) -> str:
        spec = completion_spec(
            from_path=f"../build/{gguf}",
            num_ctx=None,
            licence=None,
            title=title,
            comment=(create(name, preset), *common),
        )
        return render_modelfile(spec)

    instruct = instruct_spec(
        from_path="../build/solar-dus.gguf",
        family=chat.family("solar"),
        num_ctx=None,
        licence=None,
        title="A depth-up-scaled model that was tuned on SOLAR's instruct format.",
        comment=(create("solar-instruct"), *common),
    )
    texts = {
        "solar": completion(
            "solar", "solar-dus.gguf", "The depth-up-scaled model, in the preset made last."
        ),
        "solar-instruct": render_modelfile(instruct),
    }
    for preset in PRESETS:
        title = f"The depth-up-scaled model in {preset.upper()}."
        texts[f"solar-{preset}"] = completion(
            f"solar-{preset}", f"solar-dus-{preset}.gguf", title, preset
        )
    return texts
