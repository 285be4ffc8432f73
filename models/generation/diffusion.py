"""Images from text by a pipeline of diffusers: the kind `diffusers`.

N images, H and W their sides.
"""

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from diptych.models.base import GeneratedImage, ImageModel, ImageOptions, Prompt, tuples_to_lists
from diptych.models.device import choose_device
from diptych.models.errors import ModelError, ModelOptionError, one_line
from diptych.models.files.cache import to_local_path
from diptych.models.files.pretrained import quiet_transformers
from diptych.models.files.weights import model_digest
from diptych.models.generation.image_generator import encode_pixels
from diptych.models.pixels import Pixels

_BATCH_SIZE = {"cpu": 1, "cuda": 8}
_EXPECTED = "a text-to-image pipeline as diffusers saves it, with a model_index.json, weights as safetensors"
# Arguments of a pipeline, and the options that set them
_NAMED = {"num_images_per_prompt": "images_per_prompt", "height": "size", "width": "size"}
# Arguments that this module sets itself
_OWN = frozenset(["prompt", "generator", "latents", "output_type", "return_dict", "self", "kwargs"])


class _Prepared(NamedTuple):
    prompts: list[str]
    generators: list[torch.Generator]


class _Drawn(NamedTuple):
    pixels: Pixels
    is_flagged: bool


class DiffusionPipeline(ImageModel):
    """A pipeline of diffusers, on its device."""

    def __init__(self, pipeline: Any, options: ImageOptions, device: torch.device, digest: str) -> None:
        """Makes the model from a loaded pipeline.

        Args:
            pipeline: A pipeline of diffusers.
            options: The user's options.
            device: The device to run on.
            digest: The digest of files and options.

        Raises:
            ModelOptionError: The pipeline does not support an option.
        """
        known = inspect.signature(pipeline.__call__).parameters
        for name, _ in options.settings:
            if name in _NAMED:
                raise ModelOptionError(
                    f"Setting {name!r} of `setting` is `{_NAMED[name]}` here. Give it as that."
                )
            if name not in known or name in _OWN or name.startswith("callback"):
                raise ModelOptionError(
                    f"`setting` {name}: {type(pipeline).__name__} takes no such setting. Expected one of its call, "
                    "as num_inference_steps, guidance_scale or negative_prompt."
                )
        self._pipeline, self._options = pipeline.to(device), options
        self._pipeline.set_progress_bar_config(disable=True)
        self._takes_size = "height" in known and "width" in known
        side = options.size_px or _own_size(pipeline)
        if options.size_px and not self._takes_size:
            raise ModelOptionError(
                f"`size`: {type(pipeline).__name__} makes images of one size. Leave it out."
            )
        scale = int(getattr(pipeline, "vae_scale_factor", 1))
        if side % scale:
            raise ModelOptionError(
                f"`size` is {side}. {type(pipeline).__name__} makes images of a multiple of {scale} px."
            )
        self.size_px = side, side
        self.digest = digest
        self.batch_size = _BATCH_SIZE[device.type]

    @classmethod
    def load(cls, location: str, options: ImageOptions, device: str) -> "DiffusionPipeline":
        """Loads a pipeline that `save_pretrained` wrote, from anywhere, or one of the Hugging Face hub.

        Args:
            location: A path, an fsspec URL, or a name on the hub.
            options: The user's options.
            device: `auto`, `cpu`, `cuda` or `cuda:N`; half precision on CUDA.

        Raises:
            ModelError: There is no such pipeline or device; it is damaged, of another kind, or kept as a pickle.
            ModelOptionError: The pipeline does not support an option.
        """
        try:
            import diffusers
        except ImportError as error:
            raise ModelError(
                f"diffusers:{location} wants the package diffusers, which is not here. Install it: pip install "
                "'diptych[diffusers]'."
            ) from error
        chosen = choose_device(device)

        folder = to_local_path(location, hub=True, download=_download)
        if not (folder / "model_index.json").is_file():
            raise ModelError(f"{folder} holds no model_index.json. Expected {_EXPECTED}.")
        if pickles := [
            file.parent.name for file in folder.glob("*/*.bin") if not any(file.parent.glob("*.safetensors"))
        ]:
            raise ModelError(
                f"{folder} holds the weights of {', '.join(sorted(pickles))} as pickles alone, which are not loaded: "
                f"they could run anything. Expected {_EXPECTED}."
            )
        with quiet_transformers(python_warnings=True):
            diffusers.utils.logging.set_verbosity_error()
            diffusers.utils.logging.disable_progress_bar()
            pipeline = _from_folder(folder, chosen)
        content = f"{model_digest(folder)} {json.dumps(dataclasses.asdict(options), sort_keys=True)}"
        return cls(pipeline, options, chosen, hashlib.sha256(content.encode()).hexdigest()[:16])

    def prepare(self, inputs: Sequence[Prompt]) -> _Prepared:
        """Seeds a random generator for each prompt, on the CPU: the noise is the same on any device."""
        generators = [torch.Generator().manual_seed(prompt.seed) for prompt in inputs]
        return _Prepared([prompt.text for prompt in inputs], generators)

    def predict(self, prepared: _Prepared) -> list[_Drawn]:
        """Draws the images of prepared prompts."""
        settings: dict[str, Any] = {name: tuples_to_lists(value) for name, value in self._options.settings}
        for name, value in settings.items():
            if name.startswith("negative_prompt") and isinstance(value, str):
                # diffusers wants as many as there are prompts
                settings[name] = [value] * len(prepared.prompts)
        if self._takes_size:
            settings |= {"width": self.size_px[0], "height": self.size_px[1]}
        with torch.inference_mode(), quiet_transformers():
            output = self._pipeline(
                prompt=prepared.prompts, generator=prepared.generators, output_type="np", **settings
            )
        images = np.asarray(output.images)  # (N, H, W, 3), from 0 to 1
        if not np.isfinite(images).all():
            raise ValueError("the image holds numbers that are not finite")
        # As diffusers converts them itself
        pixels = (images * 255).round().astype(np.uint8)
        flags = getattr(output, "nsfw_content_detected", None) or [False] * len(pixels)
        return [_Drawn(image, bool(flag)) for image, flag in zip(pixels, flags, strict=True)]

    def finish(self, predicted: _Drawn) -> GeneratedImage:
        """Encodes an image."""
        data = encode_pixels(predicted.pixels, self._options)
        return GeneratedImage(data, "flagged" if predicted.is_flagged else None)


def _download(name: str) -> Any:
    """Fetches a pipeline from the hub: of weights in several formats, one."""
    import diffusers

    try:
        return diffusers.DiffusionPipeline.download(name, use_safetensors=True)
    except OSError as error:
        # diffusers hides the hub's own error behind its own
        raise error.__cause__ or error.__context__ or error from None


def _from_folder(folder: Path, device: torch.device) -> Any:
    from diffusers import AutoPipelineForText2Image

    dtype = torch.float32
    if device.type == "cuda":
        with torch.cuda.device(device):
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if has_bf16 else torch.float16
    try:
        return AutoPipelineForText2Image.from_pretrained(  # type: ignore[no-untyped-call]
            folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True
        )
    except Exception as error:  # diffusers raises what its many parts raise
        raise ModelError(
            f"{folder} holds no pipeline that can be loaded: {one_line(error, with_type=True)}. Expected {_EXPECTED}."
        ) from error


def _own_size(pipeline: Any) -> int:
    """Returns the side of the images that a pipeline makes by default."""
    network = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    size = getattr(getattr(network, "config", None), "sample_size", None)
    if not isinstance(size, int):
        raise ModelOptionError(
            f"{type(pipeline).__name__} does not say how large its images are. Give `size`."
        )
    return size * int(getattr(pipeline, "vae_scale_factor", 1))
