"""Loads text models by their kind, for the jobs and for the models that build on one."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from diptych.models.base import TextModel, TextOptions
from diptych.models.errors import ModelError, ModelOptionError
from diptych.models.files.location import absolute_if_there, redacted
from diptych.models.names import TEXT_KINDS, ModelName


def load_text_model(kind: str, location: str, options: TextOptions, device: str = "auto") -> TextModel:
    """Loads a text model.

    Args:
        kind: One of `TEXT_KINDS`.
        location: A path, an fsspec URL, or a name on the Hugging Face hub.
        options: The user's options.
        device: `auto`, `cpu`, `cuda` or `cuda:N`; word vectors are always on the CPU.

    Raises:
        ModelError: It cannot be loaded, or is of another kind.
    """
    # Imported here, so that a job loads the libraries of its own model only
    if kind == "word2vec":
        from diptych.models.text.word2vec import Word2Vec

        return Word2Vec.load(location, options)
    if kind == "bert":
        from diptych.models.text.bert import Bert

        return Bert.load(location, options, device)
    raise ModelError(
        f"{kind}:{location} is of kind {kind!r}. Expected KIND:LOCATION with one of {', '.join(TEXT_KINDS)}."
    )


LoadText = Callable[[str, str, TextOptions], TextModel]


@dataclasses.dataclass(frozen=True)
class TextModelRef:
    """Names the text model that another model was trained with; a part of that model's configuration.

    Attributes:
        model: `KIND:LOCATION`; a local location is absolute.
        digest: The digest of the text model with its options.
        options: The text model's options.
    """

    model: str
    digest: str
    options: TextOptions

    @classmethod
    def of(cls, model: str, options: TextOptions, digest: str) -> "TextModelRef":
        """Returns the reference to a loaded text model."""
        name = ModelName.parse(model)
        return cls(redacted(f"{name.kind}:{absolute_if_there(name.location)}"), digest, options)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TextModelRef":
        """Returns the reference that `dataclasses.asdict` turned into values.

        Raises:
            TypeError: Values are missing or unknown.
        """
        return cls(**{**values, "options": TextOptions(**values["options"])})

    def load(self, elsewhere: str | None, load_text: LoadText = load_text_model) -> TextModel:
        """Loads the text model.

        Args:
            elsewhere: `KIND:LOCATION` of its present place; None is its place at training.
            load_text: Loads a text model by its kind and location.

        Raises:
            ModelError: It cannot be loaded, or has changed since.
            ModelOptionError: `elsewhere` names another model.
        """
        kind, location = ModelName.parse(elsewhere or self.model)
        remedy = "Where it is elsewhere now, say so with `text_model` KIND:LOCATION, or train again."
        try:
            text = load_text(kind, location, self.options)
        except ModelOptionError:
            raise
        except ModelError as error:
            if elsewhere:
                raise
            raise ModelError(
                f"The text model that this one was trained with, {self.model}, cannot be loaded: {error} {remedy}"
            ) from error
        if text.digest == self.digest:
            return text
        if elsewhere:
            raise ModelOptionError(
                f"`text_model` {elsewhere} is another text model (digest {text.digest}) than the one that this model "
                f"was trained with, {self.model} (digest {self.digest}). Images need the very same: name that."
            )
        raise ModelError(
            f"The text model that this one was trained with, {self.model}, has changed since: its digest is "
            f"{text.digest}, and was {self.digest}. Images need the very same. {remedy}"
        )
