"""Models of transformers as they lie on a disk: how one is loaded, and how other weights get into it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gym_queue.engines.chat_template import ChatTemplate
from gym_queue.errors import EngineSetupError, EngineUnavailableError

if TYPE_CHECKING:
    from gym_queue.settings import Settings

LONGEST_CONTEXT = 16_384
"""Tokens, where a model does not say what its context is."""

NOT_INSTALLED = "models of the kind hf: need transformers and torch; install gym_queue[hf]"

_LONGEST_ERROR = 300


@dataclass(frozen=True)
class Model:
    """A loaded model with what generation needs to know about it. ``name``: its folder or name on the Hub."""

    name: str
    network: Any
    template: ChatTemplate
    stop_ids: tuple[int, ...]
    context: int


def load(name: str, settings: Settings) -> Model:
    """Load tokenizer and weights. Takes seconds to minutes.

    Raises:
        EngineSetupError: there is no such model, or it cannot be given messages.
        EngineUnavailableError: there is not enough memory.
    """
    try:
        import torch  # noqa: PLC0415 - heavy, and only where a model runs
        import transformers  # noqa: PLC0415
    except ImportError as error:
        raise EngineSetupError(NOT_INSTALLED) from error

    transformers.utils.logging.disable_progress_bar()
    has_gpu = torch.cuda.is_available()
    if not has_gpu and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))  # verifiers and Redis need cores too
    path, trust = str(Path(name).expanduser()), settings.tokenizer_trust_remote_code
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
        network: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path, trust_remote_code=trust, dtype="auto" if has_gpu else torch.float32
        )
        network = network.to("cuda" if has_gpu else "cpu").eval()
    except torch.OutOfMemoryError as error:
        msg = f"there is not enough GPU memory for hf:{name}"
        raise EngineUnavailableError(msg) from error
    except Exception as error:  # a folder of any origin may make the loaders raise anything
        msg = f"the model hf:{name} cannot be loaded: {sentence(error)}"
        raise EngineSetupError(msg) from error
    if not tokenizer.chat_template:
        raise EngineSetupError(no_template(name))
    stop_ids = _stop_ids(network.generation_config.eos_token_id, tokenizer.eos_token_id)
    text_config = network.config.get_text_config()
    return Model(
        name=path,
        network=network,
        template=ChatTemplate(tokenizer, stop_ids),
        stop_ids=stop_ids,
        context=getattr(text_config, "max_position_embeddings", None) or LONGEST_CONTEXT,
    )


def replace(model: Model, uri: str) -> None:
    """Copy other weights into a network, all of them or none. Nothing may be generated meanwhile.

    Args:
        model: what was loaded. Its tokenizer, template and precision stay.
        uri: path of a folder as ``save_pretrained`` writes it, or of a safetensors file with the names of
            tensors that such a folder has; ``file://`` may stand before it. Empty: the model's own weights,
            as they were loaded at first.

    Raises:
        EngineUnavailableError: they cannot be read (they may be on their way), or fit another network.
    """
    path = uri.removeprefix("file://")
    try:
        weights = _read(model.network, Path(path).expanduser() if path else model.name)
    except Exception as error:  # a folder of any origin may make the loaders raise anything
        msg = f"the weights {uri or model.name} cannot be loaded: {sentence(error)}"
        raise EngineUnavailableError(msg) from error
    model.network.load_state_dict(weights)


def _read(network: Any, path: Path | str) -> dict[str, Any]:
    """Read the weights of a network of the same shape. Raises whatever is in the way."""
    source: dict[str, Any]
    if isinstance(path, Path) and path.is_file():
        from safetensors.torch import load_file  # noqa: PLC0415 - heavy, and only where a model runs

        source = {
            "pretrained_model_name_or_path": None,
            "state_dict": load_file(path),
            "config": network.config,
        }
    elif isinstance(path, str) or path.is_dir():
        source = {"pretrained_model_name_or_path": path}
    else:
        msg = "there is no such file or folder"
        raise FileNotFoundError(msg)
    read, report = type(network).from_pretrained(**source, dtype=network.dtype, output_loading_info=True)
    if report["missing_keys"]:  # transformers would leave these to chance
        msg = f"{len(report['missing_keys'])} tensors are missing, {min(report['missing_keys'])} among them"
        raise ValueError(msg)
    weights: dict[str, Any] = read.state_dict()
    if {name: one.shape for name, one in weights.items()} != {
        name: one.shape for name, one in network.state_dict().items()
    }:
        msg = "they are those of a network of another shape"
        raise ValueError(msg)
    return weights


def sentence(error: Exception) -> str:
    """Return what an error says, as one line of at most 300 characters."""
    return " ".join(str(error).split())[:_LONGEST_ERROR] or type(error).__name__


def no_template(name: str) -> str:
    """Return the sentence for a model without chat template."""
    return f"the tokenizer of hf:{name} has no chat template, so it cannot be given messages"


def _stop_ids(*sources: int | list[int] | None) -> tuple[int, ...]:
    """Merge the end-of-turn ids of the generation config (one or many) and of the tokenizer."""
    listed = [source if isinstance(source, list) else [source] for source in sources]
    return tuple(dict.fromkeys(stop for stops in listed for stop in stops if stop is not None))
