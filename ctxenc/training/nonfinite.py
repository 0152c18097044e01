"""Find the source of a loss or a gradient that is not finite."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ctxenc.runs.errors import UserError
from ctxenc.swap.states import rng_state, set_rng_state


class Before:
    """Store the state before a training forward changes it: the buffers of `network`, and the generators."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.device = device
        self.buffers = list(network.buffers())
        self.kept = [each.clone() for each in self.buffers]
        self.rng: dict[str, Any] = {}

    @torch.no_grad()
    def store(self) -> None:
        """Store the present state."""
        if self.buffers:
            torch._foreach_copy_(self.kept, self.buffers)  # one by one: 1 ms on a GPU, for a ResNet-50
        self.rng = rng_state(self.device)

    @torch.no_grad()
    def restore(self, generators: bool = True) -> None:
        """Restore the stored state; include the generators only to repeat the same random draws."""
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.kept)
        if generators:
            set_rng_state(self.rng, self.device)


def is_finite(value: Any) -> bool:
    """Return whether all numbers of a tensor, or of the tensors in a dict, list or tuple, are finite."""
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    if isinstance(value, dict):
        value = list(value.values())
    return all(map(is_finite, value)) if isinstance(value, list | tuple) else True


def check_outputs(network: nn.Module, outputs: Tensor, of: str) -> None:
    """Raise UserError if the outputs of a trained network hold NaN or infinity; name its weights that do."""
    if not is_finite(outputs):
        weights = _describe_weights(network) or "finite"
        raise UserError(f"the network's outputs for {of} are not finite; its weights are {weights}")


def check_weights(network: nn.Module) -> None:
    """Raise UserError if the weights of a trained network hold NaN or infinity."""
    if weights := _describe_weights(network):
        raise UserError(f"the network's weights are not finite: {weights}")


def _describe_weights(network: nn.Module) -> str:
    names = [name for name, each in network.state_dict().items() if not is_finite(each)]
    return f"NaN or infinity in {_few(names)}" if names else ""


def _few(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


@torch.no_grad()
def first_nonfinite(network: nn.Module, forward: Callable[[], Any]) -> str:
    """Describe the first layer of `network` with an output that is not finite when `forward` runs."""
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not is_finite(output):
                weights = "" if is_finite(list(module.parameters())) else ", whose weights are not finite either"
                found.append(f"layer {name or 'the whole network'} ({type(module).__name__}{weights})")

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in network.named_modules()]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the loss itself: every layer's output is finite"


@torch.no_grad()
def nonfinite_gradients(network: nn.Module, most: int) -> str:
    """Describe the parameters of `network` with a gradient that is not finite; list at most `most` names."""
    names = [name for name, each in network.named_parameters() if each.grad is not None and not is_finite(each.grad)]
    if not names:
        return "each number of it is finite, but its norm is not"
    return f"it is NaN or infinite in {_few(names[::-1], most)}, nearest the loss first"
