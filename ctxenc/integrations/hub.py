"""save_pretrained and from_pretrained, by huggingface_hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin


class Saved(PyTorchModelHubMixin):
    """A network that is saved as safetensors beside the arguments that rebuild it, and loaded strictly.

    The weights of a backbone are in the file: from_pretrained does not ask timm for them.
    """

    def stored(self, **arguments: Any) -> None:
        """Say how arguments that are no JSON are stored; None for one that cannot be."""
        self._hub_mixin_config: Any = {**(self._hub_mixin_config or {}), **arguments}

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that rebuild this network, without pretrained weights.

        Raises:
            ValueError: one of them is no JSON.
        """
        config = {**self._hub_mixin_config, "pretrained_backbone": False}
        for argument in self._hub_mixin_init_parameters:
            if argument != "self" and config.get(argument) is None:
                raise ValueError(f"{type(self).__name__}: to be saved, {argument} must be given as a name or a number")
        return config

    def _save_pretrained(self, save_directory: Path) -> None:
        self._hub_mixin_config = self.config
        super()._save_pretrained(save_directory)

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **kwargs: Any) -> Any:
        return super()._from_pretrained(strict=strict, **(kwargs | {"pretrained_backbone": False}))
