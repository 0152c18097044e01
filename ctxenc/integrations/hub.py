"""save_pretrained and from_pretrained, by huggingface_hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin


class Saved(PyTorchModelHubMixin):
    """A network that is saved as safetensors beside the arguments that rebuild it, and loaded strictly.

    The weights of a backbone are in the file: from_pretrained does not ask timm for them.
    """

    def _save_pretrained(self, save_directory: Path) -> None:
        name = type(self).__name__
        config: dict[str, Any] = dict(self._hub_mixin_config or {})  # type: ignore[arg-type]
        for argument in self._hub_mixin_init_parameters:
            if argument not in ("self", *config):
                raise ValueError(
                    f"{name}: save_pretrained needs arguments that are JSON; {argument} is none, give its name"
                )
        self._hub_mixin_config = config | {"pretrained_backbone": False}
        super()._save_pretrained(save_directory)

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **kwargs: Any) -> Any:
        return super()._from_pretrained(strict=strict, **(kwargs | {"pretrained_backbone": False}))
