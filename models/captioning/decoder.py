"""The language half of a captioner: a recurrent network that predicts words from an image's features.

With attention it is the soft model of "Show, Attend and Tell" (Xu et al. 2015, 3.1.2 and 4.2.1: additive attention, the
gate beta, the deep output layer); without, "Show and Tell" (Vinyals et al. 2015, 3.1: the pooled image is the first
input). Three things differ: the annotation vectors are projected once an image, each with a learnt position (as in ViT,
Dosovitskiy et al. 2021); the attention also depends on the word that was just read; and the output layer shares its
weights with the word embedding (Press and Wolf 2017).

B captions, N images, T words, M words of all captions, L regions, D encoder channels, E embedding, H hidden,
A attention, V vocabulary.
"""

import dataclasses
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from diptych.models.captioning.vocabulary import PAD


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder.

    Attributes:
        cell: `lstm` (Hochreiter and Schmidhuber 1997), `gru` (Cho et al. 2014) or `rnn` (Elman 1990, tanh).
        attention: Attend to the regions at each word; else the pooled image is the first input.
        vocab_size: V, with the special words.
        feature_dim: D.
        num_regions: L.
        embedding_dim: E.
        hidden_dim: H.
        attention_dim: A.
        dropout: Share of units dropped in training, of words, images and outputs.
    """

    cell: Literal["lstm", "gru", "rnn"]
    attention: bool
    vocab_size: int
    feature_dim: int
    num_regions: int
    embedding_dim: int = 512
    hidden_dim: int = 512
    attention_dim: int = 256
    dropout: float = 0.5


class ImageFeatures(NamedTuple):
    """What the decoder needs to know of each image.

    Attributes:
        values: (N, L, E) projected regions; (N, 1, E), their mean, without attention.
        keys: (N, L, A) the attention's keys; empty without attention.
    """

    values: Tensor
    keys: Tensor

    def select(self, index: Tensor) -> "ImageFeatures":
        """Returns the features of the images at (B,) indices."""
        return ImageFeatures(self.values.index_select(0, index), self.keys.index_select(0, index))

    def first(self, count: int) -> "ImageFeatures":
        """Returns the features of the first `count` images."""
        return ImageFeatures(self.values[:count], self.keys[:count])


class Predictions(NamedTuple):
    """Predictions of every next word of given captions.

    Attributes:
        logits: (M, V) the logits of each next word.
        targets: (M,) the number of the word that comes next.
        captions: (M,) the index of the word's caption.
    """

    logits: Tensor
    targets: Tensor
    captions: Tensor


class State(NamedTuple):
    """The recurrent state, (B, H) each; `cell` is used by an LSTM only."""

    hidden: Tensor
    cell: Tensor

    def select(self, index: Tensor) -> "State":
        """Returns the states at (B,) indices."""
        return State(self.hidden.index_select(0, index), self.cell.index_select(0, index))

    def first(self, count: int) -> "State":
        """Returns the first `count` states."""
        return State(self.hidden[:count], self.cell[:count])


class Decoder(nn.Module):
    """Predicts the words of captions from image features."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        embedding, hidden, attention = config.embedding_dim, config.hidden_dim, config.attention_dim
        self.words = nn.Embedding(config.vocab_size, embedding, padding_idx=PAD)
        # The names of layers are those of saved weights, so this one stays
        self.picture = nn.Linear(config.feature_dim, embedding)
        self.start = nn.Linear(embedding, 2 * hidden)
        inputs = embedding
        if config.attention:
            self.places = nn.Parameter(torch.zeros(config.num_regions, embedding))
            self.keys = nn.Linear(embedding, attention)
            self.query = nn.Linear(embedding + hidden, attention, bias=False)
            self.score = nn.Linear(attention, 1, bias=False)
            self.gate = nn.Linear(hidden, embedding)
            inputs += embedding
        cells = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}
        self.cell = cells[config.cell](inputs, hidden)
        self.from_hidden = nn.Linear(hidden, embedding)
        # Not the embedding itself: the output layer shares its weights, so a word would predict itself again
        self.from_word = nn.Linear(embedding, embedding, bias=False)
        if config.attention:
            self.from_context = nn.Linear(embedding, embedding, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.dropout = nn.Dropout(config.dropout)
        nn.init.normal_(self.words.weight, std=embedding**-0.5)

    def encode_image(self, regions: Tensor) -> ImageFeatures:
        """Returns the features of N images from their regions (N, L, D)."""
        if self.config.attention:
            values = torch.relu(self.picture(self.dropout(regions)) + self.places)  # (N, L, E)
            return ImageFeatures(values, self.keys(values))
        values = torch.relu(self.picture(self.dropout(regions.mean(dim=1, keepdim=True))))  # (N, 1, E)
        return ImageFeatures(values, values.new_empty(len(values), 0, 0))

    def init_state(self, features: ImageFeatures) -> State:
        """Returns the state before the first word."""
        pooled = features.values.mean(dim=1)  # (B, E)
        hidden, cell = torch.tanh(self.start(pooled)).chunk(2, dim=1)
        if self.config.attention:
            return State(hidden, cell)
        zeros = torch.zeros_like(hidden)
        return self._advance(pooled, State(zeros, zeros))

    def step(self, words: Tensor, state: State, features: ImageFeatures) -> tuple[Tensor, State]:
        """Advances each caption by a word.

        Args:
            words: (B,) the words' numbers.
            state: The state before the word.
            features: The image features of each caption.

        Returns:
            (B, E) outputs, for `logits`, and the state after the word.
        """
        embedded = self.words(words)
        state, context = self._read(embedded, state, features)
        return self._output(embedded, state.hidden, context), state

    def _read(self, embedded: Tensor, state: State, features: ImageFeatures) -> tuple[State, Tensor]:
        """Returns the state after a word, and the (B, E) context from the image; (B, 0) without attention."""
        if not self.config.attention:
            return self._advance(embedded, state), embedded.new_empty(len(embedded), 0)
        query = self.query(torch.cat([embedded, state.hidden], dim=1))[:, None]  # (B, 1, A)
        weights = torch.softmax(self.score(torch.tanh(features.keys + query)), dim=1)  # (B, L, 1)
        context = torch.bmm(weights.transpose(1, 2), features.values)[:, 0]  # (B, E)
        context = torch.sigmoid(self.gate(state.hidden)) * context
        return self._advance(torch.cat([embedded, context], dim=1), state), context

    def _output(self, embedded: Tensor, hidden: Tensor, context: Tensor) -> Tensor:
        output = self.from_word(embedded) + self.from_hidden(self.dropout(hidden))
        return output + self.from_context(context) if self.config.attention else output

    def _advance(self, inputs: Tensor, state: State) -> State:
        if self.config.cell == "lstm":
            return State(*self.cell(inputs, (state.hidden, state.cell)))
        return State(self.cell(inputs, state.hidden), state.cell)

    def logits(self, outputs: Tensor) -> Tensor:
        """Returns (…, V) logits of the next word for (…, E) outputs."""
        return nn.functional.linear(self.dropout(torch.tanh(outputs)), self.words.weight, self.bias)

    def forward(self, regions: Tensor, image_index: Tensor, words: Tensor) -> Predictions:
        """Predicts every next word, given the words before it (teacher forcing).

        Captions that have ended take no part in later steps, so M is the number of all words and ends.

        Args:
            regions: (N, L, D) the regions of the images.
            image_index: (B,) the index of each caption's image.
            words: (B, T + 1) the words' numbers, from `START` to `END`, then `PAD`.
        """
        lengths = (words[:, 1:] != PAD).sum(dim=1)
        order = lengths.argsort(descending=True, stable=True)
        words = words[order]
        # Captions are in descending order of length, so those that have a word at a step are the first ones
        num_alive = (words[:, 1:] != PAD).sum(dim=0).tolist()
        features = self.encode_image(regions).select(image_index[order])
        state = self.init_state(features)
        embedded = self.dropout(self.words(words[:, :-1]))  # (B, T, E)
        steps, targets, captions = [], [], []
        for at, count in enumerate(num_alive):
            if not count:
                break
            features, state = features.first(count), state.first(count)
            state, context = self._read(embedded[:count, at], state, features)
            steps.append((embedded[:count, at], state.hidden, context))
            targets.append(words[:count, at + 1])
            captions.append(order[:count])
        outputs = self._output(*(torch.cat(parts) for parts in zip(*steps, strict=True)))
        return Predictions(self.logits(outputs), torch.cat(targets), torch.cat(captions))
