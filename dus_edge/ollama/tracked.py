"""The Modelfiles that the repository keeps in `modelfiles/`, one per preset and two more."""

from dus_edge.ollama import chat
from dus_edge.ollama.modelfile import (
    NUM_CTX_CAP,
    completion_spec,
    instruct_spec,
    render_modelfile,
)
from dus_edge.quant.recipe import PRESETS


def tracked_modelfiles() -> dict[str, str]:
    """The texts of the repository's `modelfiles/` by file name.

    They run whatever base the GGUFs in `build/` were made from, so they name neither a
    licence nor a base, and their `num_ctx` is one that Ollama lowers to the model's own.
    """
    common = (
        f"num_ctx: {NUM_CTX_CAP}, which Ollama lowers to the model's context length if that is"
        " less.",
        "Licence: that of the base checkpoint. `dus-edge modelfile` writes a Modelfile that"
        " states it.",
    )

    def create(name: str) -> str:
        return f"Create it with: ollama create {name.replace('solar', 'solar-dus', 1)} -f" + (
            f" modelfiles/{name}"
        )

    def completion(name: str, gguf: str, title: str) -> str:
        spec = completion_spec(
            from_path=f"../build/{gguf}",
            num_ctx=NUM_CTX_CAP,
            licence=None,
            title=title,
            comment=(create(name), *common),
        )
        return render_modelfile(spec)

    instruct = instruct_spec(
        from_path="../build/solar-dus.gguf",
        family=chat.family("solar"),
        num_ctx=NUM_CTX_CAP,
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
        texts[f"solar-{preset}"] = completion(f"solar-{preset}", f"solar-dus-{preset}.gguf", title)
    return texts
