"""The options of `gguf` that make a mix of types of its own, and what is said of one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dus_edge.cli.quants.sensitivity import DEFAULT_CHUNKS
from dus_edge.errors import UsageError
from dus_edge.words import format_bytes, parse_bytes, wrap

if TYPE_CHECKING:
    from dus_edge.jobs.export.mix import FitGoal, MadeMix, Measuring, MixChoice

_GOALS = ("target_size", "target_bpw", "like", "fit", "mix")
_FIT_ONLY = ("at", "fit_memory", "fit_platform", "fit_kv_type", "reserve")
_OPTIONS = (
    click.option(
        "--target-size",
        metavar="SIZE",
        help="Choose each tensor's type so that the file takes at most this, such as 6GiB, at "
        "the least expected divergence.",
    ),
    click.option(
        "--target-bpw", type=float, metavar="B", help="The same by bits per weight of the file."
    ),
    click.option(
        "--like", metavar="PRESET", help="The same at no more bytes than this preset's file."
    ),
    click.option(
        "--fit",
        metavar="DEVICE",
        help="The same within a device's memory, as it is predicted with all layers on it.",
    ),
    click.option("--at", type=int, metavar="N", help="Context of --fit. [default: 4096]"),
    click.option(
        "--fit-memory", type=float, metavar="GB", help="Memory of a device made with several sizes."
    ),
    click.option("--fit-platform", metavar="NAME", help="System of --fit, as of dus-edge fit."),
    click.option("--fit-kv-type", metavar="TYPE", help="KV cache of --fit. [default: f16]"),
    click.option("--reserve", metavar="SIZE", help="Memory that --fit leaves to other programs."),
    click.option(
        "--sensitivity",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="What each type costs each tensor, as dus-edge sensitivity writes it. [default: what "
        "-o DIR has of this model, else it is measured first]",
    ),
    click.option(
        "--keep",
        multiple=True,
        metavar="ROLE=TYPE",
        help="Give all matrices of a role this type: embedding=q6_k. Repeat it for several.",
    ),
    click.option(
        "--tensor-type",
        "patterns",
        multiple=True,
        metavar="REGEX=TYPE",
        help="Give matrices in whose GGUF names REGEX is found this type, as llama-quantize does; "
        "of several the first counts.",
    ),
    click.option(
        "--mix",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Use the types of this .mix file, or of a GGUF, again.",
    ),
    click.option(
        "--mix-plot",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Draw the types of all layers, as .svg or .png.",
    ),
)


@dataclass(frozen=True)
class MixWords:
    """What was asked of a mix.

    Attributes:
        choice: the same as the job takes it.
        plot: the picture to be drawn.
        goal: the option that says what the types are chosen by; None if presets do.
    """

    choice: MixChoice
    plot: Path | None
    goal: str | None


def mix_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The types of single tensors; the command gets `mix`, None if nothing of it is asked for."""
    for option in reversed(_OPTIONS):
        command = option(command)

    @functools.wraps(command)
    def wrapped(**given: Any) -> Any:
        names = (*_GOALS, *_FIT_ONLY, "sensitivity", "keep", "patterns", "mix_plot")
        asked = {name: given.pop(name) for name in names}
        words = _taken(asked) if any(v not in (None, ()) for v in asked.values()) else None
        return command(mix=words, **given)

    return wrapped


def _taken(asked: dict[str, Any]) -> MixWords:
    """The options as one thing.

    Raises:
        UsageError: two goals, an option without the one that it belongs to, a value that cannot
            be.
    """
    from dus_edge.jobs.export.mix import MixChoice
    from dus_edge.quant.mix.matrices import fix_by_pattern, keep_role
    from dus_edge.quant.recipe import find_preset

    goals = [_option(name) for name in _GOALS if asked[name] is not None]
    if len(goals) > 1:
        raise UsageError(f"{goals[0]} and {goals[1]} both say what the types are; give one.")
    if asked["fit"] is None:
        for name in _FIT_ONLY:
            if asked[name] is not None:
                raise UsageError(f"{_option(name)} belongs to --fit DEVICE; add that.")
    budget = bool(goals) and asked["mix"] is None
    if asked["sensitivity"] is not None and not budget:
        raise UsageError(
            "--sensitivity is what types are chosen by; add a budget: --target-size, --target-bpw, "
            "--like or --fit."
        )
    fixed = (*map(fix_by_pattern, asked["patterns"]), *map(keep_role, asked["keep"]))
    if not goals and not fixed:
        raise UsageError("--mix-plot draws a mix; ask for one, such as by --like q4_k_m.")
    plot = asked["mix_plot"]
    if plot is not None:
        _check_plot(plot)
    size, bits = asked["target_size"], asked["target_bpw"]
    if bits is not None and not 0 < bits < 64:
        raise UsageError(f"--target-bpw is {bits:g}; a number of bits such as 4.5 is needed.")
    choice = MixChoice(
        size_bytes=None if size is None else parse_bytes(size, "--target-size"),
        bits_per_weight=bits,
        like=None if asked["like"] is None else find_preset(asked["like"]),
        fit=None if asked["fit"] is None else _fit(asked),
        replay=asked["mix"],
        sensitivity=asked["sensitivity"],
        fixed=fixed,
    )
    return MixWords(choice, plot, goals[0] if goals else None)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _fit(asked: dict[str, Any]) -> FitGoal:
    from dus_edge.jobs.export.mix import FitGoal
    from dus_edge.predict.prediction import choose_device

    reserve = asked["reserve"]
    return FitGoal(
        choose_device(asked["fit"]),
        asked["at"],
        asked["fit_memory"],
        asked["fit_platform"],
        asked["fit_kv_type"] or "f16",
        0 if reserve is None else parse_bytes(reserve, "--reserve"),
    )


def _check_plot(path: Path) -> None:
    from dus_edge.files import check_writable
    from dus_edge.tables.grow.seam_plot import check_seam_plot

    if path.suffix not in (".svg", ".png"):
        raise UsageError(f"--mix-plot {path}: pictures are written as .svg or .png.")
    check_seam_plot()
    check_writable(path.parent)


def measuring_of(
    folder: Path, text: Any, machine: Any, quantizer: str, imatrix: str | None
) -> Measuring:
    """How to find out what types cost, by the options of `gguf`."""
    from dus_edge.jobs.export.mix import Measuring
    from dus_edge.jobs.export.sensitivity import AssumedStorage

    n_chunks = text.n_chunks or DEFAULT_CHUNKS
    storage = AssumedStorage(imatrix, quantizer)
    return Measuring(folder, replace(text, n_chunks=n_chunks), machine, storage)


def made_mixes(
    words: MixWords,
    base: str,
    choose: Any,
    asked: Sequence[str],
    presets: Sequence[Any],
    measuring: Any,
    adapter: Path | None,
    say: Callable[[str], None],
) -> list[MadeMix]:
    """The mixes that were asked for, said and drawn.

    Args:
        words: what was asked.
        base: what the user calls the base.
        choose: gives the plan for its depth.
        asked: presets as they were given with -q.
        presets: the same, or the default.
        measuring: how to find out what types cost, where no file says it.
        adapter: to be merged.
        say: takes lines for the user.

    Raises:
        UsageError: presets beside a goal, or a goal that cannot be met.
    """
    from dus_edge.jobs.export.mix import make_mixes

    if words.goal is not None and asked:
        raise UsageError(
            f"-q {','.join(asked)} and {words.goal} both say what the types are; give one of them."
        )
    made = make_mixes(
        base,
        choose,
        words.choice,
        presets,
        measuring,
        adapter=adapter,
        has_imatrix=measuring.storage.imatrix is not None,
        say=say,
    )
    for mix in made:
        say(mix_text(mix))
    if words.plot is not None:
        _draw(made[-1], words.plot)
    return made


def mix_text(mix: MadeMix) -> str:
    """A mix as it is printed, no line over 80 columns."""
    from dus_edge.tables.mix.text import layer_grid, role_table

    kinds = mix.preset.chosen
    bits = 8 * mix.file_bytes / mix.model.n_parameters
    lines = [
        wrap(
            f"Mix, {mix.goal}: {format_bytes(mix.file_bytes)}, {bits:.2f} bits per weight",
            rest="  ",
        )
    ]
    if mix.taken is not None:
        taken, most = mix.taken
        left = f"{format_bytes(taken)} of {format_bytes(most)}, {format_bytes(most - taken)} left"
        lines.append(f"  budget: {left}")
    if mix.expected_kl is not None:
        said = f"expected divergence {mix.expected_kl:.3g} nats per token"
        if mix.rivals:
            name, kl = min(mix.rivals.items(), key=lambda item: item[1])
            said += f"; of the presets that keep the budget {name} has least, {kl:.3g}"
        lines.append(wrap(said, first="  ", rest="  "))
    grid = layer_grid(mix.matrices, kinds)
    notes = [wrap(f"note: {note}", rest="  ") for note in mix.notes]
    return "\n".join([*lines, *notes, "", role_table(mix.matrices, kinds), "", grid, ""])


def mix_json(made: Sequence[MadeMix]) -> list[dict[str, Any]]:
    """The same for programs."""
    return [
        {
            "preset": mix.preset.name,
            "goal": mix.goal,
            "expected_kl": mix.expected_kl,
            "gap_to_bound": mix.gap,
            "presets_expected_kl": None if mix.rivals is None else dict(mix.rivals),
            "budget_bytes": None if mix.taken is None else mix.taken[1],
            "taken_bytes": None if mix.taken is None else mix.taken[0],
            "types": {name: kind.name for name, kind in mix.preset.chosen.items()},
        }
        for mix in made
    ]


def _draw(mix: MadeMix, path: Path) -> None:
    from dus_edge.files import output_files, pwrite_all
    from dus_edge.tables.mix.plot import render_mix

    title = f"{mix.model.name.stem}, {mix.goal}, {format_bytes(mix.file_bytes)}"
    data = render_mix(mix.matrices, mix.preset.chosen, title, path.suffix[1:])
    with output_files([(path, len(data))]) as (fd,):
        pwrite_all(fd, data, 0)
