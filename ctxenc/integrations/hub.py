"""Provide save_pretrained and from_pretrained through huggingface_hub."""

import json
from collections.abc import Callable
from contextlib import suppress
from inspect import signature
from pathlib import Path
from stat import S_IMODE
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin, constants


def write_with_usual_mode(path: Path, write: Callable[[], Any]) -> None:
    """Write a file with default permissions: safetensors makes its files readable by the owner alone."""
    is_new = not path.exists()
    path.touch()
    mode = S_IMODE(path.stat().st_mode)
    try:
        write()
    except BaseException:
        if is_new:
            path.unlink(missing_ok=True)
        raise
    with suppress(PermissionError):  # a file system without permissions
        path.chmod(mode)


def build_without_memory(build: Callable[[], Any]) -> Any:
    """Run build() on the meta device; on the CPU if an older timm backbone reads values while it is built."""
    try:
        with torch.device("meta"):
            return build()
    except NotImplementedError:
        return build()


class Saved(PyTorchModelHubMixin):
    """Save a network as safetensors beside its arguments, and load it strictly.

    Its `config` holds these arguments. The file includes the backbone's weights: from_pretrained does not ask timm for them.
    """

    config: dict[str, Any]

    @torch.jit.ignore
    def checked_config(self) -> dict[str, Any]:
        """Return the arguments that rebuild this network, without timm's weights.

        Raises:
            TypeError: one of them is not JSON.
            ValueError: they build another network, as after patch_se_blocks or with another classifier.
        """
        name = type(self).__name__
        for argument, value in self.config.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError):
                raise TypeError(f"{name}: {argument} must be JSON to be saved, got {value!r}") from None
        config = self.config | {"pretrained_backbone": False}
        fresh: Any = build_without_memory(lambda: type(self)(**config))
        own: Any = self
        built, mine = (
            {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()} for network in (fresh, own)
        )
        if changed := sorted(dict(built.items() ^ mine.items())):
            raise ValueError(
                f"{name}: to be saved, a network must be as its arguments build it, got one that was changed at {changed[0]}:"
                f" {mine.get(changed[0])} for {built.get(changed[0])}; restore_se_blocks and unfuse() take back what they did"
            )
        return config

    @torch.jit.ignore
    def save_pretrained(self, save_directory: str | Path, *, config: Any = None, **kwargs: Any) -> str | None:
        """Write config.json, model.safetensors and a model card into a folder.

        Args:
            save_directory: the folder; created if missing.
            config: stored in place of this network's arguments.
            **kwargs: any other argument of PyTorchModelHubMixin.save_pretrained.

        Raises:
            TypeError: an argument of this network is not JSON.
            ValueError: its arguments build another network, as after patch_se_blocks.
        """
        return super().save_pretrained(save_directory, config=config or self.checked_config(), **kwargs)

    @torch.jit.ignore
    def _save_pretrained(self, save_directory: Path) -> None:
        path = save_directory / constants.SAFETENSORS_SINGLE_FILE
        write_with_usual_mode(path, lambda: super(Saved, self)._save_pretrained(save_directory))

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **kwargs: Any) -> Any:
        # Networks saved without an aggregation took the sum.
        before = {"aggregation": "sum"} if "aggregation" in signature(cls).parameters else {}
        return super()._from_pretrained(strict=strict, **(before | kwargs | {"pretrained_backbone": False}))
