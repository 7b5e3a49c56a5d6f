"""What a call of an opened release is given, as the complete arrays that its artifact takes; or what is wrong with it."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compiler.errors import InputError
from compiler.manifest import Manifest
from compiler.types import Tensor

if TYPE_CHECKING:
    import numpy as np

    from compiler.runtime import Config

    Arrays = dict[str, np.ndarray[Any, Any]]

# Inputs that the original takes, or its tokenizer or processor makes, though an artifact may have been made without: what
# each must hold throughout to say nothing.
NEUTRAL: Mapping[str, int] = {"attention_mask": 1, "token_type_ids": 0}
SOUND = ("input_values", "input_features")


def complete(given: Mapping[str, Any], manifest: Manifest, config: Config) -> Arrays:
    """Arrays, nested lists or torch tensors under the names of a release's inputs, as arrays of the signature's dtypes; a mask
    that is left out is all ones, token types are zeros.

    Raises:
        InputError: the model does not take that.
    """
    import numpy as np

    wanted = {tensor.name: tensor for tensor in manifest.signature.inputs}
    arrays = _arrays(given, wanted)
    if missing := [name for name in wanted if name not in arrays and name not in NEUTRAL]:
        raise InputError(f"no {missing[0]} {'are' if missing[0].endswith('s') else 'is'} given")
    sizes = _sizes(arrays, wanted)
    for name, tensor in wanted.items():
        shape = [axis if isinstance(axis, int) else sizes[axis] for axis in tensor.shape] if name not in arrays else []
        arrays.setdefault(name, np.full(shape, NEUTRAL.get(name, 0), dtype=np.int64))
    if "input_ids" in arrays:
        _check_tokens(arrays, wanted, manifest.positions, config)
    mask = arrays["attention_mask"] if "attention_mask" in arrays else np.ones(1)
    if ((mask != 0) & (mask != 1)).any():
        raise InputError("attention_mask: holds something else than 0 and 1")
    if "attention_mask" not in wanted and (mask != 1).any():
        raise InputError("attention_mask: the compiled model has none, and these are not all 1; give sounds of one length")
    return {name: arrays[name] for name in wanted}


def _arrays(given: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> Arrays:
    import numpy as np

    known = {*wanted, *(["token_type_ids"] if "input_ids" in wanted else [])}
    known |= {"attention_mask"} if wanted.keys() & set(SOUND) else set()
    arrays = {}
    for name, value in given.items():
        # `use_cache=False` and the like ask for nothing; so does None.
        if value is None or value is False:
            continue
        if name not in known:
            raise InputError(f"{name}: the compiled model does not take it; it takes {', '.join(wanted)}")
        try:
            array = np.asarray(value.detach().cpu() if is_tensor(value) else value)
        except ValueError as error:
            raise InputError(f"{name}: rows of different length; pad them to one length") from error
        whole = name not in wanted or wanted[name].dtype.startswith("int")
        if array.dtype.kind not in ("iub" if whole else "f"):
            takes = "integers" if whole else "floats, as the checkpoint's processor makes them"
            raise InputError(f"{name}: is {array.dtype}, and the model takes {takes}")
        arrays[name] = np.ascontiguousarray(array, dtype=np.int64 if whole else np.float32)
    return arrays


def _sizes(arrays: Arrays, wanted: Mapping[str, Tensor]) -> dict[str, int]:
    """The sizes of dynamic axes. Raises InputError when the arrays disagree, have another rank, or are empty."""
    main = next(iter(wanted))
    sizes: dict[str, int] = {}
    owners: dict[str, str] = {}
    for name in (*wanted, *(name for name in arrays if name not in wanted)):
        if name not in arrays:
            continue
        array, axes = arrays[name], wanted[name if name in wanted else main].shape
        fits = array.ndim == len(axes)
        for axis, size in zip(axes, array.shape, strict=False):
            fits = fits and (size == axis if isinstance(axis, int) else sizes.setdefault(axis, size) == size)
            owners.setdefault(str(axis), name)
        if not fits:
            beside = next((owner for axis in axes if (owner := owners.get(str(axis), name)) != name), None)
            more = f", {name} as {beside}" if beside else ""
            raise InputError(f"{name}: has shape {array.shape}; the model takes [{', '.join(map(str, axes))}]{more}")
        if array.size == 0:
            raise InputError(f"an empty batch: {name} has shape {array.shape}")
    return sizes


def _check_tokens(arrays: Arrays, wanted: Mapping[str, Tensor], positions: int | None, config: Config) -> None:
    ids = arrays["input_ids"]
    if positions is not None and ids.shape[-1] > positions:
        raise InputError(f"input_ids: {ids.shape[-1]} tokens, and the model has {positions} positions; cut the text")
    vocabulary = _of_text(config, "vocab_size")
    if ids.min() < 0 or ids.max() >= vocabulary:
        worst = int(ids.max() if ids.max() >= vocabulary else ids.min())
        raise InputError(f"input_ids: {worst} is no token of the model, which has {vocabulary}")
    if (types := arrays.get("token_type_ids")) is None:
        return
    if "token_type_ids" in wanted:
        kinds = getattr(config, "type_vocab_size", 2)
        if types.min() < 0 or types.max() >= kinds:
            raise InputError(f"token_type_ids: {int(types.max())}; the model has {kinds} types")
    elif types.any() and getattr(config, "type_vocab_size", None) != 0:
        raise InputError("token_type_ids: the compiled model has none, and these are not all 0")


def _of_text(config: Config, name: str) -> Any:
    """A setting of a model's text half, where it has two; else its own."""
    half = config.to_dict().get("text_config")
    if half is None:
        return getattr(config, name)
    if isinstance(half, Mapping) and name in half:
        return half[name]
    return getattr(config.whole().text_config, name)


def check_length(inputs: Mapping[str, np.ndarray[Any, Any]], config: Config) -> None:
    """Refuse sounds that a model's convolutions make no frame of: of those ONNX Runtime and TorchScript fail, and OpenVINO's
    answer is empty.

    Raises:
        InputError: a sound is too short.
    """
    if "input_values" not in inputs or (convolutions := _convolutions(config)) is None:
        return
    least = 1
    for kernel, stride in reversed(convolutions):
        least = (least - 1) * stride + kernel
    mask = inputs.get("attention_mask")
    shortest = inputs["input_values"].shape[-1] if mask is None else int(mask.sum(axis=-1).min())
    if shortest < least:
        raise InputError(f"a sound of {shortest} samples is too short: the model takes {least} or more")


def frames(samples: int, config: Config) -> int | None:
    """How many frames a model's convolutions make of so many samples; None where its config does not tell."""
    if (convolutions := _convolutions(config)) is None:
        return None
    for kernel, stride in convolutions:
        samples = (samples - kernel) // stride + 1
    return samples


def _convolutions(config: Config) -> list[tuple[int, int]] | None:
    """Kernel and stride of each convolution over samples, of Wav2Vec2 and its kin."""
    settings = config.to_dict()
    kernels, strides = settings.get("conv_kernel"), settings.get("conv_stride")
    if not (isinstance(kernels, list) and isinstance(strides, list)) or settings.get("add_adapter"):
        return None
    return list(zip(kernels, strides, strict=True))


def samples_per_frame(config: Config) -> int | None:
    """By how many samples a model's frames are apart; None where its config does not tell."""
    convolutions = _convolutions(config)
    return None if convolutions is None else math.prod(stride for _, stride in convolutions)


def shapes(inputs: Mapping[str, np.ndarray[Any, Any]], signature: Sequence[Tensor]) -> str:
    """A batch, for a reader: `2 × 5 tokens`, or its main input and its shape."""
    main = signature[0].name
    if main == "input_ids" and len(signature[0].shape) == 2 and "pixel_values" not in inputs:
        return f"{' × '.join(map(str, inputs[main].shape))} tokens"
    return " and ".join(f"{name} {list(value.shape)}" for name, value in inputs.items() if name not in NEUTRAL)


def output_bytes(inputs: Mapping[str, np.ndarray[Any, Any]], manifest: Manifest) -> int:
    """What the outputs of a batch take, at the least: axes that no input has (frames, feature maps) count as 1."""
    sizes: dict[str, int] = {}
    for tensor in manifest.signature.inputs:
        if tensor.name in inputs:
            pairs = zip(tensor.shape, inputs[tensor.name].shape, strict=False)
            sizes.update({axis: size for axis, size in pairs if isinstance(axis, str)})
    outputs = manifest.signature.outputs
    return sum(4 * math.prod(axis if isinstance(axis, int) else sizes.get(axis, 1) for axis in one.shape) for one in outputs)


def is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)
