"""save_pretrained and from_pretrained, by huggingface_hub."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin


class Saved(PyTorchModelHubMixin):
    """A network that is saved as safetensors beside the arguments that rebuild it, and loaded strictly.

    Its `config` holds these arguments. The weights of a backbone are in the file: from_pretrained does not ask timm for them.
    """

    config: dict[str, Any]

    @torch.jit.ignore
    def checked_config(self) -> dict[str, Any]:
        """The arguments that build this network again, before its weights are loaded.

        Raises:
            TypeError: one of them is no JSON.
        """
        for argument, value in self.config.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError):
                raise TypeError(f"{type(self).__name__}: {argument} must be JSON to be saved, got {value!r}") from None
        return self.config | {"pretrained_backbone": False}

    @torch.jit.ignore
    def save_pretrained(self, save_directory: str | Path, *, config: Any = None, **kwargs: Any) -> str | None:
        """Write config.json, model.safetensors and a model card into a folder.

        Args:
            save_directory: the folder; made if there is none.
            config: what to store in place of this network's arguments.
            **kwargs: any other argument of PyTorchModelHubMixin.save_pretrained.

        Raises:
            TypeError: an argument of this network is no JSON.
        """
        return super().save_pretrained(save_directory, config=config or self.checked_config(), **kwargs)

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **kwargs: Any) -> Any:
        return super()._from_pretrained(strict=strict, **(kwargs | {"pretrained_backbone": False}))
