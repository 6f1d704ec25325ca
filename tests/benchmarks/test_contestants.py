"""The other methods do what they are named for: every element once a sweep, no backward below the group, kept or dropped state."""

import torch
from torch import nn
from torch.optim import AdamW

from benchmarks.contestants import InBackward, Plain, Rotation, layers_of
from tests.models import llama, token_batch


def _model() -> nn.Module:
    torch.manual_seed(0)
    return llama().train()


def _rotation(*, keep: bool) -> tuple[nn.Module, Rotation]:
    model = _model()
    return model, Rotation(model, layers_of(model), keep=keep)


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_a_rotation_trains_one_group_a_step_and_all_in_a_sweep() -> None:
    model, rotation = _rotation(keep=True)
    assert rotation.steps == 4
    moved = []
    for _ in range(rotation.steps):
        before = _weights(model)
        rotation.step(token_batch())
        moved.append({name for name, weight in _weights(model).items() if not torch.equal(weight, before[name])})
    assert moved[0] == {"model.embed_tokens.weight"}
    assert moved[3] == {"model.norm.weight", "lm_head.weight"}
    assert sorted(name for names in moved for name in names) == sorted(_weights(model))


def test_backward_stops_at_the_group() -> None:
    model, rotation = _rotation(keep=False)
    reached: list[bool] = []
    model.get_submodule("model.layers.0").register_forward_hook(lambda _module, _args, out: reached.append(out.requires_grad))
    for _ in range(rotation.steps):
        rotation.step(token_batch())
    assert reached == [True, True, False, False]


def test_state_is_kept_in_the_file_or_dropped() -> None:
    (kept, keeping), (dropped, dropping) = _rotation(keep=True), _rotation(keep=False)
    for sweep in range(2):
        for step in range(keeping.steps):
            keeping.step(token_batch(sweep * 7 + step))
            dropping.step(token_batch(sweep * 7 + step))
        ours, theirs = _weights(kept), _weights(dropped)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours) == (sweep == 0), "the second sweep starts from other moments"


def test_updates_in_backward_equal_updates_after_it() -> None:
    plain, eager = _model(), _model()
    one, other = Plain(plain), InBackward(eager, lambda parameter: AdamW([parameter], lr=1e-5, fused=True))
    for seed in range(3):
        one.step(token_batch(seed))
        other.step(token_batch(seed))
    ours, theirs = _weights(plain), _weights(eager)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(parameter.grad is None for parameter in eager.parameters())
