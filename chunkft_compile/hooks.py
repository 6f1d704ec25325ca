"""Hooks that chunked training cannot honour, refused by name: they wait for gradients that are never whole, or for autograd to pass by."""

from collections.abc import Iterator

from torch import nn


def refuse_hooks(model: nn.Module) -> None:
    """Raise `ValueError` for hooks on gradients of parameters and on the backward of modules. Hooks of forward are traced like any code."""
    for what, way_out in _found(model):
        raise ValueError(
            f"{what}, which would never run: chunked training has no dense gradients, and one backward for all modules; {way_out}"
        )


def _found(model: nn.Module) -> Iterator[tuple[str, str]]:
    # Private (2.13.0): where tensors and modules keep their hooks; there is no public way to ask
    for name, parameter in model.named_parameters():
        if getattr(parameter, "_backward_hooks", None) or getattr(parameter, "_post_accumulate_grad_hooks", None):
            yield (
                f"{name} has a hook on its gradient (register_hook or register_post_accumulate_grad_hook)",
                "remove it before compile(), and do its work between backward() and step() on model.parameters(), which are the chunks",
            )
    for name, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            yield (
                f"{name or 'the model'} ({type(module).__name__}) has a backward hook (register_full_backward_hook)",
                "remove it before compile()",
            )
