"""The plan of a training: against what real steps take, and against figures reckoned by hand."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from click.testing import CliRunner

from dus_edge.cli.main import cli
from dus_edge.errors import UsageError
from dus_edge.predict.devices import find_device
from dus_edge.predict.training.memory import plan_training
from dus_edge.predict.training.speed import flops_per_token, load_efficiencies, training_speed
from dus_edge.predict.training.verdict import judge_training
from dus_edge.predict.training.work import TrainingWork, layers_of_mode, work_of_mode
from dus_edge.tables.predicted import solar_config
from dus_edge.upscale.plan import choose
from tests.cases import check_each
from tests.scripts import load_script

SOLAR = solar_config()
PLAN = choose(32)
N = 10_731_524_096  # parameters


def solar(mode, **fields):
    return plan_training(SOLAR, work_of_mode(mode, PLAN, backend="CUDA", **fields))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(
    torch.version.cuda is not None,
    reason="torch's CUDA build: its libraries take 400 MB more than the plan's CPU build",
)
def test_what_real_steps_take_is_planned_within_a_tenth():
    script = load_script("check_training_memory")
    case = script.Case("pico", "all", 1024, packed=True)
    planned, measured = case.planned.total_bytes, script.measure(case)
    assert planned == pytest.approx(measured, rel=script.LIMIT)
    # The interpreter alone would not do.
    assert case.planned.tensors_bytes > 0.2 * measured


def test_qlora_of_solar_at_2048_tokens():
    # NF4 with double quantization and 16-bit embeddings 5.92 GB, as others reckon; adapters of rank
    # 16 have 48 x 16 x (4 x 4,096 + 2 x (4,096 + 1,024) + 3 x (4,096 + 14,336) + ...) = 62.9 M.
    m = solar("qlora")
    assert m.trained_parameters == 62_914_560
    assert m.weights_bytes == pytest.approx(5.92e9 + 2 * 62.9e6, rel=0.01)
    assert 8.0e9 < m.total_bytes < 9.2e9


def test_full_training_of_solar():
    # 4 B weights, 8 moments, 4 gradients, and a bf16 copy of linear ones: 18 B a parameter, 193 GB;
    # at the step the copies are gone, but a foreach AdamW would make one in f32: 20 B.
    fused = solar("all")
    assert fused.optimizer_bytes == 8 * N
    assert fused.weights_bytes == 4 * N
    assert fused.total_bytes == pytest.approx(193e9, rel=0.03)
    assert solar("all", fused=False).total_bytes == pytest.approx(20 * N, rel=0.1)


def test_eight_cards_take_an_eighth_each():
    one, eight = solar("all", gpus=1), solar("all", gpus=8)
    assert eight.weights_bytes == pytest.approx(one.weights_bytes / 8, abs=8)
    assert eight.optimizer_bytes == pytest.approx(one.optimizer_bytes / 8, abs=8)
    assert eight.total_bytes < 80e9 < one.total_bytes


def test_less_is_trained_and_less_is_taken():
    order = [solar(mode).total_bytes for mode in ("all", "copies", "seam:4", "lora", "qlora")]
    assert order == sorted(order, reverse=True)
    assert (
        solar("lora", checkpointing=False).activations_bytes > 5 * solar("lora").activations_bytes
    )


def test_layers_are_those_that_the_trainer_has_learn():
    assert layers_of_mode("copies", PLAN) == tuple(range(24, 40))
    assert layers_of_mode("seam:8", PLAN) == tuple(range(20, 28))
    with pytest.raises(UsageError):
        layers_of_mode("copies", choose(32, upscale=False))


def test_operations_of_a_token():
    # 6 N and attention for all; a second forward with checkpointing. Linear: 218,103,808 a layer.
    linear, head, attention = 48 * 218_103_808, 32_000 * 4096, 48 * 2 * 4096 * 2048
    plain = work_of_mode("all", PLAN, backend="CUDA", checkpointing=False)
    assert flops_per_token(SOLAR, plain) == 6 * (linear + head) + 3 * attention
    again = work_of_mode("all", PLAN, backend="CUDA")
    assert flops_per_token(SOLAR, again) == 8 * linear + 6 * head + 4 * attention
    copies = work_of_mode("copies", PLAN, backend="CUDA", checkpointing=False)
    each, looks = linear / 48, attention / 48
    expected = 2 * linear + attention + 24 * (2 * each + 2 * looks) + 16 * 2 * each + 4 * head
    assert flops_per_token(SOLAR, copies) == expected


def test_the_efficiencies_are_those_of_the_published_runs():
    fitted = load_script("fit_training_speed").fitted()
    for method, share in load_efficiencies().items():
        assert share.low == pytest.approx(fitted[method]["low"], abs=1e-5)
        assert share.middle == pytest.approx(fitted[method]["middle"], abs=1e-5)
        assert share.high == pytest.approx(fitted[method]["high"], abs=1e-5)
        assert 0 < share.low < share.middle < share.high < 1


def test_speed_is_of_all_cards_and_never_of_a_cpu():
    card = find_device("h100-80gb-sxm")
    one, eight = (
        training_speed(SOLAR, work_of_mode("all", PLAN, backend="CUDA", gpus=n), card)
        for n in (1, 8)
    )
    assert eight.tokens_per_s == pytest.approx(8 * one.tokens_per_s)
    assert one.tokens_per_s_low < one.tokens_per_s < one.tokens_per_s_high
    with pytest.raises(UsageError):
        training_speed(SOLAR, work_of_mode("all", PLAN, backend="CUDA"), find_device("m3-10c"))


def test_what_is_proposed_fits():
    card = find_device("rtx-4090")
    work = work_of_mode("all", PLAN, backend="CUDA", batch=4)
    verdict = judge_training("SOLAR", SOLAR, PLAN, work, card)
    assert not verdict.fits
    assert [c.words.split()[0] for c in verdict.changes] == ["--gpus", "--train", "--train"]
    for change in verdict.changes:
        assert judge_training("SOLAR", SOLAR, PLAN, change.work, card).fits
    assert judge_training("S", SOLAR, PLAN, verdict.changes[-1].work, card).changes == ()


def test_work_that_cannot_be_is_refused():

    def check(fields):
        with pytest.raises(UsageError):
            TrainingWork(**fields)

    check_each(
        check,
        [
            {"sequence": 0},
            {"batch": -1},
            {"precision": "f8"},
            {"quantized": True},
            {"quantized": True, "lora_rank": 8, "gpus": 2},
            {"layers": (), "ends": False},
        ],
    )


def fit(*args):
    return CliRunner().invoke(cli, ["fit", "pico", "--drop", "2", *args])


def test_fit_plans_a_training():
    shown = fit("--train", "copies", "--device", "rtx-4090", "--tokens", "1e6")
    assert shown.exit_code == 0, shown.output
    assert "It fits" in shown.output and "(predicted)" in shown.output
    assert max(map(len, shown.output.splitlines())) <= 80
    found = json.loads(fit("--train", "lora", "--device", "rtx-4090", "--json").output)
    assert found["fits"] and found["training"]["lora_rank"] == 16
    total = sum(v for k, v in found["memory"].items() if k.endswith("_bytes"))
    assert total == 2 * found["memory"]["total_bytes"] + found["memory"]["usable_bytes"]


def test_fit_refuses_what_makes_no_sense():
    def check(args):
        result = fit(*args)
        assert isinstance(result.exception, UsageError), result.output

    check_each(
        check,
        [
            ("--tokens", "1e9"),
            ("--train", "all"),
            ("--train", "most", "--device", "rtx-4090"),
            ("--train", "all", "--device", "m3-10c"),
            ("--train", "all", "--device", "rtx-4090", "--tokens", "many"),
            ("--train", "all", "--device", "rtx-4090", "-q", "q8_0"),
            ("--train", "all", "--device", "rtx-4090", "--rank", "8"),
            ("--train", "all", "--device", "rtx-4090", "--batch", "0"),
        ],
    )
