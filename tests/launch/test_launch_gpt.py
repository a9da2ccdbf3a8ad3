import pytest
import torch

from launch import gpt
from launch.settings import ModelSettings

SETTINGS = ModelSettings(layers=2, heads=2, width=16, context=12)


def random_tokens(*shape):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(0))


def test_equal_seeds_give_equal_bits():
    first, second, other = (gpt.build(SETTINGS, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_building_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    gpt.build(SETTINGS, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_weight_is_initialised():
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        model = gpt.build(SETTINGS, 1)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_parameters_are_those_of_the_formula():
    layers, width, context = SETTINGS.layers, SETTINGS.width, SETTINGS.context
    # Embedding (tied to the head) and positions; 12 width^2 and two norms a layer; the last norm.
    expected = (256 + context) * width + layers * (12 * width**2 + 4 * width) + 2 * width
    assert gpt.count_parameters(gpt.build(SETTINGS, 0)) == expected


def test_later_bytes_do_not_change_earlier_predictions():
    model = gpt.build(SETTINGS, 0)
    tokens = random_tokens(3, 12)
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 256
    before, after = model.logits(tokens), model.logits(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


def test_loss_is_the_mean_cross_entropy_of_the_next_byte():
    model = gpt.build(SETTINGS, 0)
    tokens = random_tokens(3, 13)
    probabilities = model.logits(tokens[:, :-1]).double().softmax(-1)
    expected = -probabilities.gather(-1, tokens[:, 1:, None]).log().mean()
    loss = model(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)  # a few float32 ulps


def test_gradient_reaches_every_parameter():
    model = gpt.build(SETTINGS, 0)
    tokens = random_tokens(3, 13)
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_dropout_acts_in_training_only():
    model = gpt.build(SETTINGS.model_copy(update={"dropout": 0.5}), 0)
    tokens = random_tokens(3, 12)
    assert not torch.equal(model.logits(tokens), model.logits(tokens))
    model.eval()
    assert torch.equal(model.logits(tokens), model.logits(tokens))


def test_too_long_a_text_is_named():
    with pytest.raises(ValueError, match=r"tokens: got 13 positions, but model\.context is 12"):
        gpt.build(SETTINGS, 0).logits(random_tokens(1, 13))
