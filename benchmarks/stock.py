"""Stock Beam, as its guide has it: an element a row, `PytorchModelHandler…`, `WriteToParquet`. For `infer.py`."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MAX_TOKENS = 64  # of texts, where every row is padded to one length


def run_stock(prepared: Path, output: Path, setting: Any) -> None:
    """Runs stock Beam: an element a row."""
    import apache_beam as beam
    import pyarrow as pa
    from apache_beam.ml.inference.base import KeyedModelHandler, RunInference
    from apache_beam.options.pipeline_options import PipelineOptions

    output.mkdir(parents=True)
    parts = {"caption": _stock_captioner, "embed": _stock_encoder, "generate": _stock_generator}[setting.job]
    columns, to_elements, handler, to_value, field = parts(setting, output / "state.pth")
    with beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner"])) as pipeline:
        _ = (
            pipeline
            | beam.Create([str(file) for file in sorted((prepared / "images").iterdir())])
            | beam.Reshuffle()
            | beam.io.ReadAllFromParquet(columns=["key", *columns])
            | beam.FlatMap(to_elements)
            | RunInference(KeyedModelHandler(handler))
            | beam.Map(lambda pair: {"key": pair[0], field.name: to_value(pair[1].inference)})
            | beam.io.WriteToParquet(
                str(output / "part"), pa.schema([("key", pa.string()), field]), file_name_suffix=".parquet"
            )
        )


Stock = tuple[list[str], Callable[[dict[str, Any]], Any], Any, Callable[[Any], Any], Any]


def _stock_captioner(setting: Any, state: Path) -> Stock:
    import pyarrow as pa
    import torch
    from apache_beam.ml.inference.pytorch_inference import PytorchModelHandlerTensor

    from diptych.models.base import CaptionOptions
    from diptych.models.captioning.captioner import CaptionNetwork
    from diptych.models.pixels import decode_pixels

    kind, _, location = setting.model.partition(":")

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = CaptionNetwork.load(Path(location), (kind,))

        def forward(self, pixels: torch.Tensor) -> list[str]:
            found = self.network.search(self.network.encoder(pixels), CaptionOptions())
            return [self.network.vocabulary.decode(hypotheses[0].words) for hypotheses in found]

    network = Network()
    torch.save(network.state_dict(), state)
    size_px = network.network.encoder.config.size_px

    def to_elements(row: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
        pixels = decode_pixels(row["image"]["bytes"], size_px)
        yield row["key"], torch.from_numpy(pixels.transpose(2, 0, 1).copy())

    handler = PytorchModelHandlerTensor(
        state_dict_path=str(state),
        model_class=Network,
        model_params={},
        device="GPU" if setting.device.startswith("cuda") else "CPU",
        min_batch_size=setting.batch_size,
        max_batch_size=setting.batch_size,
    )
    return ["image"], to_elements, handler, str, pa.field("caption", pa.string())


def _stock_encoder(setting: Any, state: Path) -> Stock:
    import pyarrow as pa
    import torch
    import transformers
    from apache_beam.ml.inference.pytorch_inference import PytorchModelHandlerKeyedTensor

    location = setting.model.partition(":")[2]

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.AutoModel.from_pretrained(location)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            hidden = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
            mask = attention_mask[..., None]
            return (hidden * mask).sum(1) / mask.sum(1)

    encoder = Encoder()
    torch.save(encoder.state_dict(), state)
    tokenizer = transformers.AutoTokenizer.from_pretrained(location)

    def to_elements(row: dict[str, Any]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        for i, text in enumerate(row["captions"]):
            tokens = tokenizer(text, padding="max_length", truncation=True, max_length=MAX_TOKENS)
            names = ("input_ids", "attention_mask")
            yield f"{row['key']}-{i}", {name: torch.tensor(tokens[name]) for name in names}

    handler = PytorchModelHandlerKeyedTensor(
        state_dict_path=str(state),
        model_class=Encoder,
        model_params={},
        device="GPU" if setting.device.startswith("cuda") else "CPU",
        min_batch_size=setting.batch_size,
        max_batch_size=setting.batch_size,
    )
    field = pa.field("embedding", pa.list_(pa.float32()))
    return ["captions"], to_elements, handler, lambda vector: vector.tolist(), field


def _stock_generator(setting: Any, state: Path) -> Stock:
    import numpy as np
    import pyarrow as pa
    import torch
    from apache_beam.ml.inference.pytorch_inference import PytorchModelHandlerTensor

    from diptych.models.base import ImageOptions, TextOptions
    from diptych.models.generation.generator import to_pixels
    from diptych.models.generation.image_generator import draw_noise, encode_pixels, read_generator
    from diptych.models.text.text_model import load_text_model
    from diptych.transforms.inference.generate import sample_seed

    kind, _, location = setting.model.partition(":")
    _, source = read_generator(Path(location), (kind,))
    text_kind, _, text_location = source.model.partition(":")
    text = load_text_model(text_kind, text_location, TextOptions(), "cpu")

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator, _ = read_generator(Path(location), (kind,))

        def forward(self, told: torch.Tensor) -> torch.Tensor:
            dim = self.generator.config.text_dim
            return to_pixels(self.generator(told[:, :dim], told[:, dim:])).contiguous()

    network = Network()
    torch.save(network.state_dict(), state)
    latent_dim = network.generator.config.latent_dim

    def to_elements(row: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
        for i, caption in enumerate(row["captions"]):
            (vector,) = text.predict(text.prepare([caption]))
            noise = draw_noise(sample_seed(0, row["key"], i, 0), latent_dim)
            yield f"{row['key']}-{i}", torch.from_numpy(np.concatenate([vector.values, noise]))

    handler = PytorchModelHandlerTensor(
        state_dict_path=str(state),
        model_class=Network,
        model_params={},
        device="GPU" if setting.device.startswith("cuda") else "CPU",
        min_batch_size=setting.batch_size,
        max_batch_size=setting.batch_size,
    )
    field = pa.field("image", pa.binary())
    return (
        ["captions"],
        to_elements,
        handler,
        lambda pixels: encode_pixels(pixels.cpu().numpy(), ImageOptions()),
        field,
    )
