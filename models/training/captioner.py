"""Training of a captioner: word by word against the captions that people wrote (cross entropy, teacher forcing).

The encoder is frozen, its features made once, or trained along. Every draw follows from the seed and the step, so a
training that was killed and goes on from its checkpoint ends, on a CPU, with the same weights to the last bit.
"""

import collections
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable
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
from diptych.models.files.weights import digest, localise, read_tensors
from diptych.models.metrics.caption_scores import score_captions
from diptych.models.training.cache import CaptionCache, open_cache
from diptych.models.training.captioner_batches import Pictures, Step, Steps
from diptych.models.training.checkpoint import Checkpoint, Checkpoints, flatten_optimizer, restore_optimizer
from diptych.models.training.data import SCORES, CaptionData, History, Progress
from diptych.models.training.options import CaptionerTraining
from diptych.models.training.self_critical import CiderReward, advantages, sample_captions

_CHECKPOINT_S = 120.0
_WARMUP_STEPS = 200
_MAX_GRADIENT = 5.0
_OnProgress = Callable[[Progress], None]


def train_captioner(
    data: CaptionData,
    output: Path,
    options: CaptionerTraining,
    device: str,
    on_progress: _OnProgress,
    cache: Path | None = None,
) -> History:
    """Trains a captioner, or goes on with one, and writes it to a folder.

    Args:
        data: To train on, and to choose the best epoch by.
        output: Local folder for the model; the checkpoint is left in it, for who calls to delete.
        options: What to train, and how.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        on_progress: Is told how far it is.
        cache: Where the pictures are cached; None puts them below `output`.

    Returns:
        Losses and scores by epoch; the model of the best CIDEr is the one that is saved.

    Raises:
        ModelError: The data or the options cannot be trained with, or a file cannot be written.
    """
    chosen = choose_device(device)
    torch.manual_seed(options.seed)
    encoder, source = _make_encoder(options)
    pictures = Pictures(encoder.to(chosen), options, chosen)
    identity = f"{data.fingerprint} {source}"
    splits = []
    for name, batches, num_rows in (
        ("train", data.train, data.num_train),
        ("validation", data.validation, data.num_validation),
    ):

        def on_rows(done: int, total: int = num_rows) -> None:
            on_progress(Progress("reading", 0, done, total))

        folder = (cache or output / "_cache") / name
        split = open_cache(folder, identity, pictures.layout, num_rows, batches, pictures.encode, on_rows)
        if not len(split):
            raise ModelError(
                f"none of the {num_rows} {name} rows has a caption. A captioner learns from images with captions: "
                "give some, or another --validation."
            )
        splits.append(split)
    counts = collections.Counter(w for texts in splits[0].all_captions() for text in texts for w in text)
    vocabulary = Vocabulary.build(counts, options.min_word_count)
    torch.manual_seed(options.seed)
    decoder = Decoder(_decoder_config(options, encoder, vocabulary))
    network = CaptionNetwork(encoder, decoder, vocabulary).to(chosen)
    training = _Training(network, pictures, splits[0], splits[1], options, chosen, on_progress)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads or before)
    try:
        return training.run(output)
    finally:
        torch.set_num_threads(before)


def _make_encoder(options: CaptionerTraining) -> tuple[Encoder, str]:
    """Returns the encoder to begin with, and what stands for its weights."""
    weights = options.encoder_weights
    if weights == "none" and not options.fine_tune:
        raise ModelError(
            "--encoder_weights none without --fine_tune would caption from random features. Add --fine_tune to train "
            "the encoder from scratch, or give weights."
        )
    size_px, stride_px = options.encoder_size_px, options.encoder_stride_px
    encoder = create_encoder(options.encoder, size_px, stride_px, pretrained=weights == "imagenet")
    source = f"{options.encoder} {size_px} {stride_px}"
    if weights not in ("imagenet", "none"):
        path = localise(weights)
        load_weights(encoder, read_tensors(path), str(path))
        source += f" {digest(path)}"
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


@dataclasses.dataclass
class _Position:
    """Where a training is; with the tensors, all that it goes on from."""

    step: int = 0
    loss_sum: float = 0.0
    best: float = -math.inf
    best_loss: float = math.inf
    best_epoch: int = -1
    rewarded_from: int | None = None
    seconds: float = 0.0
    history: History = dataclasses.field(default_factory=list)


class _Training:
    def __init__(
        self,
        network: CaptionNetwork,
        pictures: Pictures,
        train: CaptionCache,
        validation: CaptionCache,
        options: CaptionerTraining,
        device: torch.device,
        on_progress: _OnProgress,
    ) -> None:
        self._network, self._pictures, self._options, self._device = network, pictures, options, device
        self._train, self._validation, self._on_progress = train, validation, on_progress
        self._steps = math.ceil(len(train) / options.batch_size)
        encoder_rate = (
            options.learning_rate if options.encoder_weights == "none" else options.encoder_learning_rate
        )
        groups = [{"params": list(network.decoder.parameters()), "peak": options.learning_rate}]
        if options.fine_tune:
            groups.append({"params": list(network.encoder.parameters()), "peak": encoder_rate})
        self._optimizer = torch.optim.AdamW(groups, options.learning_rate, weight_decay=options.weight_decay)
        self._average = {name: value.clone() for name, value in self._trained().items()}
        self._best = dict(self._average)
        self._at = _Position()
        self._precision = training_precision(options.precision, device)
        self._make = Steps(pictures, network.vocabulary, options)
        self._reward = (
            CiderReward(map(self._make.number, train.all_captions())) if options.cider_epochs else None
        )

    def run(self, output: Path) -> History:
        checkpoints = Checkpoints(output)
        if checkpoint := checkpoints.latest():
            self._restore(checkpoint)
        begun = last_saved = time.monotonic() - self._at.seconds
        while not self._is_over():
            epoch, at = divmod(self._at.step, self._steps)
            if not self._rewarded and not at and self._has_converged(epoch):
                self._begin_rewards(epoch)
            self._set_training(True)
            num_captions = 0 if self._rewarded else self._options.captions_per_image
            for step in self._make.epoch(self._train, epoch, at, num_captions):
                self._at.loss_sum += self._update(step)
                self._at.step += 1
                self._report("training", epoch, self._at.step - epoch * self._steps)
                if time.monotonic() - last_saved > _CHECKPOINT_S and self._at.step % self._steps:
                    self._at.seconds = time.monotonic() - begun
                    self._save(checkpoints)
                    last_saved = time.monotonic()
            self._at.seconds = time.monotonic() - begun
            self._validate(epoch)
            self._save(checkpoints)
            last_saved = time.monotonic()
        self._put(self._best)
        self._set_training(False)
        self._network.save(output)
        return self._at.history

    @property
    def _rewarded(self) -> bool:
        return self._at.rewarded_from is not None

    def _is_over(self) -> bool:
        epoch, at = divmod(self._at.step, self._steps)
        if self._at.rewarded_from is not None:
            return epoch >= self._at.rewarded_from + self._options.cider_epochs
        return not at and not self._options.cider_epochs and self._has_converged(epoch)

    def _has_converged(self, epoch: int) -> bool:
        waited = epoch - 1 - self._at.best_epoch if epoch else 0
        return epoch >= self._options.epochs or waited >= self._options.patience

    def _begin_rewards(self, epoch: int) -> None:
        """Goes on from the best weights so far, to learn from whole captions."""
        self._at.rewarded_from = epoch
        self._put(self._best)
        self._average = {name: value.clone() for name, value in self._best.items()}
        self._optimizer.state.clear()

    def _loss(self, step: Step, label_smoothing: float, reduction: str = "mean") -> Tensor:
        words = step.words.to(self._device, non_blocking=True)
        owners = step.owners.to(self._device, non_blocking=True)
        with self._precision:
            logits, targets, _ = self._network.decoder(self._pictures.regions(step.pictures), owners, words)
        return torch.nn.functional.cross_entropy(
            logits.float(), targets, label_smoothing=label_smoothing, reduction=reduction
        )

    def _update(self, step: Step) -> float:
        options, at = self._options, self._at.step
        torch.manual_seed(options.seed * 1_000_003 + at)
        rate = options.cider_learning_rate / options.learning_rate if self._rewarded else self._share(at)
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        if self._rewarded:
            try:
                loss, found = self._reward_loss(step)
            except FloatingPointError as error:
                raise self._diverged(str(error)) from error
        else:
            loss = self._loss(step, options.label_smoothing)
            found = float(loss.detach())
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, _MAX_GRADIENT)
        self._optimizer.step()
        age = at - (self._at.rewarded_from or 0) * self._steps
        decay = min(options.ema, (1 + age) / (10 + age))
        with torch.no_grad():
            for name, value in self._trained().items():
                if value.is_floating_point():
                    self._average[name].lerp_(value, 1 - decay)
                else:
                    self._average[name].copy_(value)
        if not math.isfinite(float(loss.detach())):
            raise self._diverged(f"the loss is {float(loss.detach())}")
        return found

    def _diverged(self, what: str) -> ModelError:
        flag = "cider_learning_rate" if self._rewarded else "learning_rate"
        return ModelError(
            f"the training diverged: {what} at step {self._at.step}. Lower --{flag} (it is "
            f"{getattr(self._options, flag)}), and start anew with --overwrite."
        )

    def _share(self, at: int) -> float:
        """Returns the share of the highest learning rate at a step: warmed up, then a cosine."""
        total = self._options.epochs * self._steps
        warmup = min(_WARMUP_STEPS, max(1, total // 10))
        return min(1.0, (at + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * at / total))

    def _reward_loss(self, step: Step) -> tuple[Tensor, float]:
        """Returns a loss whose gradient is that of the reward of captions drawn for a batch, and minus the reward."""
        options, decoder = self._options, self._network.decoder
        num, most = options.cider_samples, options.max_words
        with self._precision:
            regions = self._pictures.regions(step.pictures)
            decoder.eval()  # the gradient must be that of the model that the captions are drawn from
            with torch.no_grad():
                words = sample_captions(decoder, decoder.look(regions), num, most)
            owners = torch.arange(len(regions), device=self._device).repeat_interleave(num)
            logits, targets, captions = decoder(regions, owners, words)
        reward = self._reward
        assert reward is not None
        drawn = words.view(len(regions), num, -1)
        wanted = (step.words[step.owners == i] for i in range(len(regions)))
        rewards = np.array(
            [reward(_plain(own), _plain(texts)) for own, texts in zip(drawn, wanted, strict=True)], np.float32
        )
        weights = torch.from_numpy(advantages(rewards).ravel()).to(self._device)
        surprise = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        return (surprise * weights[captions]).mean(), -float(rewards.mean())

    def _validate(self, epoch: int) -> None:
        """Scores the averaged weights, and keeps them where they are the best so far."""
        current = {name: value.clone() for name, value in self._trained().items()}
        self._put(self._average)
        self._set_training(False)
        with torch.inference_mode():
            losses, candidates, references = self._caption_validation(epoch)
        scores = score_captions(candidates, references)
        named = dict(zip(SCORES, (scores["bleu_1"], scores["bleu_4"], scores["cider"]), strict=True))
        # of equals, such as CIDErs of 0 at the beginning, the one that is less surprised
        if (named["CIDEr"], -losses) > (self._at.best, -self._at.best_loss):
            self._at.best, self._at.best_loss, self._at.best_epoch = named["CIDEr"], losses, epoch
            self._best = {name: value.clone() for name, value in self._average.items()}
        self._at.history.append(
            {
                "epoch": epoch + 1,
                **self._mean_loss(),
                "validation_loss": losses,
                "seconds": round(self._at.seconds, 1),
                **named,
            }
        )
        self._at.loss_sum = 0.0
        self._put(current)
        num_rows = len(self._validation)
        self._on_progress(Progress("validating", epoch, num_rows, num_rows, entry=self._at.history[-1]))

    def _mean_loss(self) -> dict[str, float]:
        mean = self._at.loss_sum / self._steps
        return {"reward": -mean} if self._rewarded else {"train_loss": mean}

    def _caption_validation(self, epoch: int) -> tuple[float, list[list[str]], list[list[list[str]]]]:
        options, split, network = self._options, self._validation, self._network
        asked = CaptionOptions(options.beam_width, 1, options.max_words)
        total, count = 0.0, 0
        candidates: list[list[str]] = []
        references: list[list[list[str]]] = []
        done = 0
        for step, captions in self._make.validation(split):
            total += float(self._loss(step, 0.0, "sum"))
            count += int((step.words[:, 1:] != PAD).sum())
            if done < options.max_scored:
                found = network.search(self._pictures.regions(step.pictures), asked)
                candidates += [network.vocabulary.decode(best[0].words).split() for best in found]
                references += captions
            done += len(captions)
            if done < len(split):  # the last comes with the scores
                self._report("validating", epoch, done)
        return total / count, candidates, references

    def _report(self, phase: str, epoch: int, done: int) -> None:
        if phase == "validating":
            self._on_progress(Progress(phase, epoch, done, len(self._validation)))
            return
        rows = min(done * self._options.batch_size, len(self._train))
        self._on_progress(Progress(phase, epoch, rows, len(self._train), self._at.loss_sum / max(1, done)))

    def _set_training(self, training: bool) -> None:
        self._network.decoder.train(training)
        # statistics of an encoder that knows ImageNet are better than those of small batches
        self._network.encoder.train(training and self._options.encoder_weights == "none")

    def _trained(self) -> dict[str, Tensor]:
        """Returns what training changes, by name: all, or the decoder alone."""
        module = self._network if self._options.fine_tune else self._network.decoder
        return module.state_dict()

    def _put(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in self._trained().items():
                value.copy_(values[name])

    def _save(self, checkpoints: Checkpoints) -> None:
        optimizer_tensors, optimizer_state = flatten_optimizer(self._optimizer)
        tensors = dict(optimizer_tensors)
        for prefix, values in (("now", self._trained()), ("average", self._average), ("best", self._best)):
            tensors |= {f"{prefix}.{name}": value for name, value in values.items()}
        state = {**dataclasses.asdict(self._at), **optimizer_state}
        checkpoints.save(self._at.step, tensors, json.loads(json.dumps(state)))

    def _restore(self, checkpoint: Checkpoint) -> None:
        def values(prefix: str) -> dict[str, Tensor]:
            found = {n: v for n, v in checkpoint.tensors.items() if n.startswith(f"{prefix}.")}
            return {n.removeprefix(f"{prefix}."): v.to(self._device) for n, v in found.items()}

        state = dict(checkpoint.state)
        restore_optimizer(self._optimizer, checkpoint.tensors, {"optimizer": state.pop("optimizer")})
        self._at = _Position(**state)
        self._average, self._best = values("average"), values("best")
        self._put(values("now"))


def _plain(words: Tensor) -> list[list[int]]:
    """Returns captions without `START` and `PAD`."""
    return [[number for number in caption if number != PAD] for caption in words[:, 1:].tolist()]
