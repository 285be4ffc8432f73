"""Training of a captioner: word by word against the captions that people wrote (cross entropy, teacher forcing).

The encoder is frozen, with features computed once, or fine-tuned. The last epochs can reward whole captions.
"""

import collections
import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diptych.models.base import CaptionOptions
from diptych.models.captioning.captioner import CaptionNetwork
from diptych.models.captioning.decoder import Decoder, DecoderConfig
from diptych.models.captioning.encoder import Encoder, create_encoder, load_weights
from diptych.models.captioning.vocabulary import PAD, Vocabulary
from diptych.models.device import choose_device, training_precision
from diptych.models.errors import ModelError
from diptych.models.files.cache import to_local_path
from diptych.models.files.weights import model_digest, read_tensors
from diptych.models.metrics.caption_scores import score_captions
from diptych.models.training.cache import CaptionCache, SplitRows, open_cache, open_splits
from diptych.models.training.captioner_batches import BatchLoader, CaptionBatch, ImageEncoder
from diptych.models.training.data import SCORES, CaptionData, History, OnProgress
from diptych.models.training.options import CaptionerTraining
from diptych.models.training.self_critical import CiderReward, advantages, sample_captions
from diptych.models.training.trainer import (
    Diverged,
    Metrics,
    Objective,
    Phase,
    Trainer,
    Validation,
    cosine,
    descend,
    warm_up,
)

_WARMUP_STEPS = 200


def train_captioner(
    data: CaptionData,
    output: Path,
    options: CaptionerTraining,
    device: str,
    on_progress: OnProgress,
    cache: Path | None = None,
) -> History:
    """Trains a captioner, or resumes one, and writes it to a folder.

    Args:
        data: The rows to train on, and to choose the best epoch by.
        output: The local folder of the model; the checkpoint stays in it, the caller deletes it.
        options: The options of the training.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        on_progress: Receives the progress.
        cache: The folder of cached images; None is a folder below `output`.

    Returns:
        Losses and scores by epoch; the weights of the best CIDEr are saved.

    Raises:
        ModelError: The data or the options cannot be trained with, or a file cannot be written.
    """
    torch_device = choose_device(device)
    torch.manual_seed(options.seed)
    encoder, source = _make_encoder(options)
    images = ImageEncoder(encoder.to(torch_device), options, torch_device)

    def open_split(folder: Path, rows: SplitRows) -> CaptionCache:
        return open_cache(folder, f"{data.fingerprint} {source}", rows, images.encoding)

    train, validation = open_splits(data, cache or output / "_cache", open_split, on_progress)
    counts = collections.Counter(
        word for captions in train.all_captions() for caption in captions for word in caption
    )
    vocabulary = Vocabulary.build(counts, options.min_word_count)
    torch.manual_seed(options.seed)
    decoder = Decoder(_decoder_config(options, encoder, vocabulary))
    network = CaptionNetwork(encoder, decoder, vocabulary).to(torch_device)
    objective = CaptionerObjective(network, images, (train, validation), options, torch_device)
    history = Trainer(objective, options, torch_device, on_progress).run(output)
    network.save(output)
    return history


def _make_encoder(options: CaptionerTraining) -> tuple[Encoder, str]:
    """Returns the encoder to begin with, and what stands for its weights."""
    weights = options.encoder_weights
    if weights == "none" and not options.fine_tune:
        raise ModelError(
            "`encoder_weights` none without `fine_tune` would caption from random features. Add `fine_tune` to train "
            "the encoder from scratch, or give weights."
        )
    size_px, stride_px = options.encoder_size_px, options.encoder_stride_px
    encoder = create_encoder(options.encoder, size_px, stride_px, pretrained=weights == "imagenet")
    source = f"{options.encoder} {size_px} {stride_px}"
    if weights not in ("imagenet", "none"):
        path = to_local_path(weights)
        load_weights(encoder, read_tensors(path), str(path))
        source += f" {model_digest(path)}"
    elif weights == "imagenet":
        state = hashlib.sha256()
        for tensor in encoder.network.state_dict().values():
            state.update(tensor.cpu().contiguous().numpy().data)
        source += f" {state.hexdigest()[:16]}"
    encoder.requires_grad_(options.fine_tune)
    return encoder.eval(), source if not options.fine_tune else f"pixels {size_px}"


def _decoder_config(options: CaptionerTraining, encoder: Encoder, vocabulary: Vocabulary) -> DecoderConfig:
    return DecoderConfig(
        options.decoder,  # type: ignore[arg-type]  # checked with the command line
        options.attention,
        len(vocabulary),
        encoder.dim,
        encoder.num_regions,
        options.embedding_dim,
        options.hidden_dim,
        options.attention_dim,
        options.dropout,
    )


class CaptionerObjective(Objective[CaptionBatch]):
    """Cross entropy of the next word; in the second phase, the reward of whole captions.

    Args:
        captioner: The network that is trained, or whose decoder is.
        images: Loads and encodes the images.
        splits: The rows to train on and the rows to validate by.
        options: The options of the training.
        device: The device of the network.
    """

    def __init__(
        self,
        captioner: CaptionNetwork,
        images: ImageEncoder,
        splits: tuple[CaptionCache, CaptionCache],
        options: CaptionerTraining,
        device: torch.device,
    ) -> None:
        self._captioner, self._images, self._options, self._device = captioner, images, options, device
        self._train, self._validation = splits
        self._precision = training_precision(options.precision, device)
        self._loader = BatchLoader(images, captioner.vocabulary, options)
        self.network = self.averaged = captioner if options.fine_tune else captioner.decoder
        self._optimizer = self._make_optimizer()
        self.optimizers = {"optimizer": self._optimizer}
        self.batch_size, self.num_rows = options.batch_size, len(self._train)
        self.num_validation = len(self._validation)
        self.phases = [Phase(options.epochs, options.patience)]
        if options.cider_epochs:
            self.phases.append(Phase(options.cider_epochs))
            self._reward = CiderReward(map(self._loader.number, self._train.all_captions()))

    def _make_optimizer(self) -> torch.optim.Optimizer:
        options, captioner = self._options, self._captioner
        groups = [{"params": list(captioner.decoder.parameters()), "lr": options.learning_rate}]
        if options.fine_tune:
            is_new = options.encoder_weights == "none"
            rate = options.learning_rate if is_new else options.encoder_learning_rate
            groups.append({"params": list(captioner.encoder.parameters()), "lr": rate})
        return torch.optim.AdamW(groups, options.learning_rate, weight_decay=options.weight_decay)

    @property
    def learning_rates(self) -> dict[str, float]:
        """The learning rate of the current phase."""
        name = "cider_learning_rate" if self.phase else "learning_rate"
        return {name: getattr(self._options, name)}

    def batches(self, epoch: int, first: int) -> Iterator[CaptionBatch]:
        """Yields the batches of an epoch from one on; those of the second phase have all captions."""
        num_captions = 0 if self.phase else self._options.captions_per_image
        return self._loader.epoch(self._train, epoch, first, num_captions)

    def lr_scale(self, step: int) -> float:
        """Returns a warm-up followed by a cosine; in the second phase, a constant."""
        options = self._options
        if self.phase:
            return options.cider_learning_rate / options.learning_rate
        total = options.epochs * self.num_steps
        return warm_up(step, min(_WARMUP_STEPS, max(1, total // 10))) * cosine(step, total)

    def step(self, batch: CaptionBatch, step: int) -> Metrics:
        """Learns from a batch."""
        if self.phase:
            loss, metrics = self._reward_loss(batch)
        else:
            loss = self._loss(batch, self._options.label_smoothing)
            metrics = {"train_loss": float(loss.detach())}
        descend(self._optimizer, loss)
        if not math.isfinite(float(loss.detach())):
            raise Diverged(f"the loss is {float(loss.detach())}")
        return metrics

    def _loss(self, batch: CaptionBatch, label_smoothing: float, reduction: str = "mean") -> Tensor:
        words = batch.words.to(self._device, non_blocking=True)
        image_index = batch.image_index.to(self._device, non_blocking=True)
        with self._precision:
            regions = self._images.regions(batch.images)
            logits, targets, _ = self._captioner.decoder(regions, image_index, words)
        return torch.nn.functional.cross_entropy(
            logits.float(), targets, label_smoothing=label_smoothing, reduction=reduction
        )

    def _reward_loss(self, batch: CaptionBatch) -> tuple[Tensor, dict[str, float]]:
        """Returns a loss with the gradient of minus the reward of captions drawn for a batch, and the mean reward."""
        decoder, num = self._captioner.decoder, self._options.cider_samples
        with self._precision:
            regions = self._images.regions(batch.images)
            # The gradient must be that of the model that the captions are drawn from: without dropout.
            decoder.eval()
            with torch.no_grad():
                try:
                    words = sample_captions(
                        decoder, decoder.encode_image(regions), num, self._options.max_words
                    )
                except FloatingPointError as error:
                    raise Diverged(str(error)) from error
            image_index = torch.arange(len(regions), device=self._device).repeat_interleave(num)
            logits, targets, captions = decoder(regions, image_index, words)
        samples = words.view(len(regions), num, -1)
        references = [batch.words[batch.image_index == i] for i in range(len(regions))]
        rewards = np.array(
            [
                self._reward(_plain(own), _plain(people))
                for own, people in zip(samples, references, strict=True)
            ],
            np.float32,
        )
        weights = torch.from_numpy(advantages(rewards).ravel()).to(self._device)
        surprise = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        return (surprise * weights[captions]).mean(), {"reward": float(rewards.mean())}

    def loss(self, metrics: Metrics) -> Tensor | float | None:
        """Returns the cross entropy, or minus the reward."""
        return -metrics["reward"] if "reward" in metrics else super().loss(metrics)

    def validate(self, epoch: int, on_rows: Callable[[int], None]) -> Validation:
        """Ranks the weights by CIDEr, then by the loss: the first CIDErs may all be 0."""
        with torch.inference_mode():
            loss, candidates, references = self._caption_validation(on_rows)
        scores = score_captions(candidates, references)
        named = dict(zip(SCORES, (scores["bleu_1"], scores["bleu_4"], scores["cider"]), strict=True))
        return Validation({"validation_loss": loss, **named}, [named["CIDEr"], -loss])

    def _caption_validation(
        self, on_rows: Callable[[int], None]
    ) -> tuple[float, list[list[str]], list[list[list[str]]]]:
        """Returns the mean loss a word, and the words of captions and references."""
        options, captioner = self._options, self._captioner
        caption_options = CaptionOptions(options.beam_width, 1, options.max_words)
        total, num_words, done = 0.0, 0, 0
        candidates: list[list[str]] = []
        references: list[list[list[str]]] = []
        for batch, captions in self._loader.validation(self._validation):
            total += float(self._loss(batch, 0.0, "sum"))
            num_words += int((batch.words[:, 1:] != PAD).sum())
            if done < options.max_scored:
                results = captioner.search(self._images.regions(batch.images), caption_options)
                candidates += [captioner.vocabulary.decode(best[0].words).split() for best in results]
                references += captions
            done += len(captions)
            on_rows(done)
        return total / num_words, candidates, references

    def set_training(self, training: bool) -> None:
        """Puts the networks into training mode; a pretrained encoder keeps the statistics of its own training."""
        self._captioner.decoder.train(training)
        self._captioner.encoder.train(training and self._options.encoder_weights == "none")


def _plain(words: Tensor) -> list[list[int]]:
    """Returns captions without `START` and `PAD`."""
    return [[number for number in caption if number != PAD] for caption in words[:, 1:].tolist()]
