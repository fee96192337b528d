"""What stands in for methods of a Transformer module while its model is pruned.

Plain objects in the module's ``__dict__``, so that copies and pickles of the model carry them along. What its class is
asked for needs a subclass.
"""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from token_pruning.runtime.attachment import MODULE_NAME
from token_pruning.runtime.prune import attachment_of, is_pruned

TENSORS_FILE = "token_pruner.safetensors"


class WholeTexts:
    """``preprocess`` without truncation, unless the caller asks for it: ``max_tokens`` chooses what enters."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, inputs: Any, prompt: Any = None, processing_kwargs: Any = None, **kwargs: Any) -> Any:
        given = dict(processing_kwargs or {})
        given["text"] = {"truncation": False, "verbose": False, **given.get("text", {})}
        module = self.module
        return type(module).preprocess(module, inputs, prompt=prompt, processing_kwargs=given, **kwargs)


class SavedBeside:
    """``save`` with the pruner's tensors in a file of their own.

    In ``model.safetensors`` transformers would report them to everybody who loads the folder dense.
    """

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, output_path: Any, *args: Any, **kwargs: Any) -> None:
        module = self.module
        if not is_pruned(module.model):  # unpruned by itself, not as a part of this
            type(module).save(module, output_path, *args, **kwargs)
            return
        attachment = attachment_of(module.model)
        model = attachment.model
        tensors = {
            f"{MODULE_NAME}.{name}": tensor.detach().cpu().contiguous()
            for name, tensor in attachment.token_pruner.state_dict().items()
        }
        before = model._keys_to_ignore_on_save
        model._keys_to_ignore_on_save = {*(before or ()), *tensors}
        try:
            type(module).save(module, output_path, *args, **kwargs)
        finally:
            model._keys_to_ignore_on_save = before
        file = Path(output_path) / TENSORS_FILE
        if not tensors:
            file.unlink(missing_ok=True)
            return
        new = file.with_suffix(".new")  # a name that no reader takes for weights
        save_file(tensors, new, {"format": "pt"})
        new.replace(file)


def reloading(module: Any) -> None:
    """Give a Transformer a class, under the name of its own, that also reads the pruner's tensors of a folder.

    A trainer reads its checkpoints by the classes of the modules that it trains, and copies the state.
    """
    own: Any = type(module)

    class Reloading(own):  # type: ignore[misc]
        stock = own

        @classmethod
        def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any) -> Any:
            loaded: Any = own.load(model_name_or_path, subfolder=subfolder, **kwargs)
            file = Path(model_name_or_path, subfolder, TENSORS_FILE)
            if file.is_file():
                tensors = nn.Module()
                for name, tensor in load_file(file).items():
                    tensors.register_buffer(name.removeprefix(f"{MODULE_NAME}."), tensor)
                loaded.model.add_module(MODULE_NAME, tensors)
            return loaded

        def __reduce_ex__(self, protocol: Any) -> Any:
            return _rebuilt, (own,), self.__dict__

    Reloading.__name__, Reloading.__qualname__, Reloading.__module__ = own.__name__, own.__qualname__, own.__module__
    module.__class__ = Reloading


def not_reloading(module: Any) -> None:
    """Undo :func:`reloading`."""
    module.__class__ = getattr(type(module), "stock", type(module))


def _rebuilt(own: Any) -> Any:
    """A Transformer that has no state yet, from a pickle or for a copy."""
    module = own.__new__(own)
    reloading(module)
    return module
