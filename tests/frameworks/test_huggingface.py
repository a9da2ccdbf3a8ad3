"""A model of transformers, trained by the Trainer's own loop: scheduler, clipping, decay, accumulation, dropout."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.adapters import problem
from tests.sharded.together import run_each

from .launcher import pretend_torchrun

pytest.importorskip("transformers")
pytestmark = pytest.mark.timeout(240)

CASES: list[tuple[Any, ...]] = [
    ({"name": "powersgd", "rank": 2, "start_step": 1}, {}),
    ({"name": "sign"}, {"gradient_accumulation_steps": 2}),
    ({"name": "onebit_adam", "freeze_step": 2, "min_numel": 100}, {}),
    ({"name": "streaming_diloco", "sync_every": 4, "fragments": 2, "overlap": 1}, {}),
    ({"name": "noloco", "sync_every": 3}, {}),
]


def _gpt2(rank: int, world_size: int, scheme: dict[str, Any], options: dict[str, Any]) -> Any:
    pretend_torchrun(rank, world_size)
    from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments, logging

    from commkit.huggingface import Trainer

    logging.set_verbosity_error()
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, 50, (64, 12), generator=generator)
    data = [{"input_ids": row, "labels": row} for row in text]
    directory = [tempfile.mkdtemp()]
    dist.broadcast_object_list(directory, src=0)

    def trainer() -> Any:
        torch.manual_seed(0)
        size = {"n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
        config = GPT2Config(vocab_size=50, bos_token_id=0, eos_token_id=0, resid_pdrop=0.1, **size)
        arguments = TrainingArguments(
            directory[0],
            use_cpu=True,
            max_steps=6,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            weight_decay=0.1,
            warmup_steps=2,
            logging_steps=1,
            save_steps=4,
            report_to=[],
            disable_tqdm=True,
            **options,
        )
        model = GPT2LMHeadModel(config)
        return Trainer(model=model, args=arguments, train_dataset=data, scheme=scheme)

    whole, rest = trainer(), trainer()
    whole.train()
    dist.barrier()
    rest.train(resume_from_checkpoint=f"{directory[0]}/checkpoint-4")
    logs = [each for each in whole.state.log_history if "loss" in each]
    return {
        "equal": problem.replicas_equal(whole.model),
        "resumed": torch.equal(problem.parameters(whole.model), problem.parameters(rest.model)),
        "optimizer": type(whole.optimizer.optimizer).__name__,
        "decays": [group["weight_decay"] for group in whole.optimizer.param_groups],
        "first": logs[0]["loss"],
        "bytes": [each["commkit/wire_bytes"] for each in logs],
        "total": logs[-1]["commkit/total_wire_bytes"],
    }


def _told(case: int) -> list[Any]:
    return run_each(_gpt2, 2, CASES)[case]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_resumed_from_the_trainers_own_checkpoint_bit_for_bit(case: int) -> None:
    assert all(told["resumed"] for told in _told(case))


@pytest.mark.parametrize("case", range(len(CASES) - 1))
def test_replicas_end_equal(case: int) -> None:
    """All but NoLoCo's, which never meet all at once."""
    assert all(told["equal"] for told in _told(case))


@pytest.mark.parametrize("case", range(len(CASES)))
def test_bytes_are_in_the_logs(case: int) -> None:
    for told in _told(case):
        assert sum(told["bytes"]) == told["total"] > 0


def test_a_scheme_changes_nothing_before_the_first_step() -> None:
    """Dropout included: nobody has drawn from the global generator."""
    first = {_told(case)[0]["first"] for case in (0, 2, 3, 4)}
    assert len(first) == 1


def test_an_optimizer_that_communicates_takes_the_arguments_of_the_trainer() -> None:
    for told in _told(2):
        assert told["optimizer"] == "OneBitAdam"
        assert told["decays"] == [0.1, 0.0]


def test_micro_batches_are_sent_once() -> None:
    for told in _told(1):
        assert len(set(told["bytes"])) == 1
