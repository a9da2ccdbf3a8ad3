"""Former optimizer blocks in today's words."""

from __future__ import annotations

import pytest

from commkit.adapters.deepspeed.legacy import is_former, translate
from commkit.config import ConfigError


def test_every_parameter_is_kept_or_noted():
    params = {"lr": 4e-4, "betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.01}
    ignored = {"cuda_aware": False, "comm_backend_name": "nccl", "bias_correction": True}
    block = {"type": "OneBitAdam", "params": {**params, "freeze_step": 23000, **ignored}}
    made = translate(block)
    assert made.block == {
        "scheme": {"name": "onebit_adam", "freeze_step": 23000},
        "optimizer": params,
    }
    for name in ignored:
        assert [note for note in made.notes if note.startswith(f"optimizer.params.{name}=")]


def test_what_is_not_given_is_as_deepspeed_had_it():
    assert translate({"type": "OneBitAdam"}).block["scheme"]["freeze_step"] == 100_000
    assert translate({"type": "zerooneadam", "params": {}}).block["scheme"] == {
        "name": "zero_one_adam",
        "var_freeze_step": 100_000,
        "var_update_scaler": 16,
        "local_step_scaler": 32_678,
        "local_step_clipper": 16,
    }
    assert translate({"type": "OneBitLamb", "params": {"max_coeff": 0.3}}).block["scheme"] == {
        "name": "onebit_lamb",
        "freeze_step": 100_000,
        "max_coeff": 0.3,
        "min_coeff": 0.01,
        "coeff_beta": 0.9,
        "factor_max": 4.0,
        "factor_min": 0.5,
        "factor_threshold": 0.1,
    }


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"amsgrad": True}, r"optimizer.params.amsgrad=True has no meaning for OneBitAdam"),
        ({"eps_inside_sqrt": True}, r"optimizer.params.eps_inside_sqrt=True"),
        ({"max_grad_norm": 1.0}, r"use gradient_clipping"),
        (
            {"freezestep": 3},
            r"optimizer.params.freezestep: unknown field, did you mean 'freeze_step'",
        ),
        ({"max_coeff": 0.3}, r"optimizer.params.max_coeff: unknown field"),
    ],
)
def test_what_nothing_can_stand_for_is_refused(params, message):
    with pytest.raises(ConfigError, match=message):
        translate({"type": "OneBitAdam", "params": params})


def test_harmless_values_pass():
    translate({"type": "OneBitAdam", "params": {"amsgrad": False, "max_grad_norm": 0.0}})


def test_other_optimizers_are_deepspeeds():
    assert not is_former({"type": "AdamW", "params": {}})
    assert not is_former(None)
    assert is_former({"type": "OneBitAdam"})
