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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.base import CaptionOptions
from models.captioner import CaptionNetwork
from models.captioner_cache import CaptionCache, Layout, open_cache
from models.captioner_data import SCORES, CaptionData, CaptionerTraining, History, Progress
from models.checkpoint import Checkpoint, Checkpoints, flatten_optimizer, restore_optimizer
from models.decoder import Decoder, DecoderConfig
from models.device import choose_device
from models.encoder import Encoder, create_encoder, load_weights
from models.errors import ModelError
from models.pixels import decode_pixels
from models.scores import score_captions
from models.store import digest, localise, read_tensors
from models.vocabulary import END, PAD, START, Vocabulary

_CHECKPOINT_S = 120.0
_WARMUP_STEPS = 200
_MAX_GRADIENT = 5.0
_VALIDATION_ROWS = 64
_OnProgress = Callable[[Progress], None]
_Array = np.ndarray[Any, Any]


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
    pictures = _Pictures(encoder.to(chosen), options, chosen)
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
    return training.run(output)


def _make_encoder(options: CaptionerTraining) -> tuple[Encoder, str]:
    """Returns the encoder to begin with, and what stands for its weights."""
    weights = options.encoder_weights
    if weights == "none" and not options.fine_tune:
        raise ModelError(
            "--encoder_weights none without --fine_tune would caption from random features. Add --fine_tune to train "
            "the encoder from scratch, or give weights."
        )
    encoder = create_encoder(options.encoder, options.encoder_size_px, pretrained=weights == "imagenet")
    source = f"{options.encoder} {options.encoder_size_px}"
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
    return encoder.eval(), source if not options.fine_tune else f"pixels {options.encoder_size_px}"


def _decoder_config(options: CaptionerTraining, encoder: Encoder, vocabulary: Vocabulary) -> DecoderConfig:
    return DecoderConfig(
        options.decoder,  # type: ignore[arg-type]  # checked with the command line
        options.attention,
        len(vocabulary),
        encoder.dim,
        options.embedding_dim,
        options.hidden_dim,
        options.attention_dim,
        options.dropout,
    )


class _Pictures:
    """Images to what the cache keeps, and from there to regions."""

    def __init__(self, encoder: Encoder, options: CaptionerTraining, device: torch.device) -> None:
        self._encoder, self._options, self._device = encoder, options, device
        self._pool = ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="decode")
        size = options.encoder_size_px
        if options.fine_tune:
            self.layout = Layout((size, size, 3), "uint8")
        else:
            self.layout = Layout((encoder.num_regions, encoder.dim), "float16", 2 if options.flips else 1)

    def encode(self, images: Sequence[bytes]) -> list[_Array]:
        size = self._options.encoder_size_px
        pixels = np.stack(list(self._pool.map(lambda data: decode_pixels(data, size), images)))
        if self._options.fine_tune:
            return [pixels]
        return [self._features(view) for view in (pixels, pixels[:, :, ::-1])[: self.layout.views]]

    def _features(self, pixels: _Array) -> _Array:
        tensor = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2)
        with torch.inference_mode():
            parts = [self._encoder(part.to(self._device)) for part in torch.split(tensor, _VALIDATION_ROWS)]
        return torch.cat(parts).cpu().numpy().astype(np.float16)

    def load(self, split: CaptionCache, rows: Sequence[int], mirrored: Sequence[bool]) -> Tensor:
        """Returns rows of the cache, in memory."""
        last = len(split.pictures) - 1
        found = np.stack(
            [split.pictures[min(last, int(flip))][row] for row, flip in zip(rows, mirrored, strict=True)]
        )
        if self._options.fine_tune:
            for i in np.flatnonzero(mirrored):
                found[i] = found[i, :, ::-1].copy()
        return torch.from_numpy(found)

    def regions(self, loaded: Tensor) -> Tensor:
        """Returns (N, L, D) regions of what `load` gave, on the device."""
        loaded = loaded.to(self._device, non_blocking=True)
        return self._encoder(loaded.permute(0, 3, 1, 2)) if self._options.fine_tune else loaded.float()


class _Step(NamedTuple):
    """A batch that is ready for the device.

    Attributes:
        pictures: As `_Pictures.load` gives them.
        owners: (B,) the picture of each caption.
        words: (B, T + 1) from `START` to `END`, then `PAD`.
    """

    pictures: Tensor
    owners: Tensor
    words: Tensor


@dataclasses.dataclass
class _Position:
    """Where a training is; with the tensors, all that it goes on from."""

    step: int = 0
    loss_sum: float = 0.0
    best: float = -math.inf
    best_epoch: int = -1
    seconds: float = 0.0
    history: History = dataclasses.field(default_factory=list)


class _Training:
    def __init__(
        self,
        network: CaptionNetwork,
        pictures: _Pictures,
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
        self._precision = _precision(options.precision, device)

    def run(self, output: Path) -> History:
        checkpoints = Checkpoints(output)
        if checkpoint := checkpoints.latest():
            self._restore(checkpoint)
        options = self._options
        begun = last_saved = time.monotonic() - self._at.seconds
        while self._at.step < options.epochs * self._steps and not self._is_over():
            epoch, at = divmod(self._at.step, self._steps)
            self._set_training(True)
            for step in self._epoch(epoch, at):
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

    def _is_over(self) -> bool:
        done = len(self._at.history)
        return done - 1 - self._at.best_epoch >= self._options.patience if done else False

    def _epoch(self, epoch: int, at: int) -> Iterator[_Step]:
        """Yields the batches of an epoch from one on, the next one made ready in the background."""
        order = np.random.default_rng((self._options.seed, epoch)).permutation(len(self._train))
        starts = range(at * self._options.batch_size, len(order), self._options.batch_size)
        rows = (order[start : start + self._options.batch_size].tolist() for start in starts)

        def load(number: int, rows: list[int]) -> _Step:
            draw = np.random.default_rng((self._options.seed, epoch, number))
            flips = draw.random(len(rows)) < (0.5 if self._options.flips else 0.0)
            captions = self._train.captions(rows)
            if most := self._options.captions_per_image:
                captions = [[texts[i] for i in draw.permutation(len(texts))[:most]] for texts in captions]
            return self._load(self._train, rows, captions, flips.tolist())

        with ThreadPoolExecutor(1, thread_name_prefix="load") as pool:
            ahead = None
            for number, chosen in enumerate(rows, at):
                ready, ahead = ahead, pool.submit(load, number, chosen)
                if ready is not None:
                    yield ready.result()
            if ahead is not None:
                yield ahead.result()

    def _load(
        self, split: CaptionCache, rows: list[int], captions: list[list[list[str]]], flips: list[bool]
    ) -> _Step:
        number, most = self._network.vocabulary.number, self._options.max_words
        numbered = [
            (owner, [START, *(number(word) for word in words[:most]), END])
            for owner, texts in enumerate(captions)
            for words in texts
        ]
        words = torch.full((len(numbered), max(len(numbers) for _, numbers in numbered)), PAD)
        for i, (_, numbers) in enumerate(numbered):
            words[i, : len(numbers)] = torch.tensor(numbers)
        owners = torch.tensor([owner for owner, _ in numbered])
        return _Step(self._pictures.load(split, rows, flips), owners, words)

    def _loss(self, step: _Step, label_smoothing: float, reduction: str = "mean") -> Tensor:
        words = step.words.to(self._device, non_blocking=True)
        owners = step.owners.to(self._device, non_blocking=True)
        with self._precision:
            logits, targets = self._network.decoder(self._pictures.regions(step.pictures), owners, words)
        return torch.nn.functional.cross_entropy(
            logits.float(), targets, label_smoothing=label_smoothing, reduction=reduction
        )

    def _update(self, step: _Step) -> float:
        options, at = self._options, self._at.step
        torch.manual_seed(options.seed * 1_000_003 + at)
        total = options.epochs * self._steps
        warmup = min(_WARMUP_STEPS, max(1, total // 10))
        share = min(1.0, (at + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * at / total))
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * share
        loss = self._loss(step, options.label_smoothing)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, _MAX_GRADIENT)
        self._optimizer.step()
        decay = min(options.ema, (1 + at) / (10 + at))
        with torch.no_grad():
            for name, value in self._trained().items():
                if value.is_floating_point():
                    self._average[name].lerp_(value, 1 - decay)
                else:
                    self._average[name].copy_(value)
        found = float(loss.detach())
        if not math.isfinite(found):
            raise ModelError(
                f"the training diverged: the loss is {found} at step {at}. Lower --learning_rate (it is "
                f"{options.learning_rate}), and start anew with --overwrite."
            )
        return found

    def _validate(self, epoch: int) -> None:
        """Scores the averaged weights, and keeps them where they are the best so far."""
        current = {name: value.clone() for name, value in self._trained().items()}
        self._put(self._average)
        self._set_training(False)
        with torch.inference_mode():
            losses, candidates, references = self._caption_validation(epoch)
        scores = score_captions(candidates, references)
        named = dict(zip(SCORES, (scores["bleu_1"], scores["bleu_4"], scores["cider"]), strict=True))
        if named["CIDEr"] > self._at.best:
            self._at.best, self._at.best_epoch = named["CIDEr"], epoch
            self._best = {name: value.clone() for name, value in self._average.items()}
        self._at.history.append(
            {
                "epoch": epoch + 1,
                "train_loss": self._at.loss_sum / self._steps,
                "validation_loss": losses,
                "seconds": round(self._at.seconds, 1),
                **named,
            }
        )
        self._at.loss_sum = 0.0
        self._put(current)
        num_rows = len(self._validation)
        self._on_progress(Progress("validating", epoch, num_rows, num_rows, entry=self._at.history[-1]))

    def _caption_validation(self, epoch: int) -> tuple[float, list[list[str]], list[list[list[str]]]]:
        options, split, network = self._options, self._validation, self._network
        asked = CaptionOptions(options.beam_width, 1, options.max_words)
        total, count = 0.0, 0
        candidates: list[list[str]] = []
        references: list[list[list[str]]] = []
        for rows in _groups(len(split)):
            captions = split.captions(rows)
            step = self._load(split, rows, captions, [False] * len(rows))
            total += float(self._loss(step, 0.0, "sum"))
            count += int((step.words[:, 1:] != PAD).sum())
            if rows[0] < options.max_scored:
                found = network.search(self._pictures.regions(step.pictures), asked)
                candidates += [network.vocabulary.decode(best[0].words).split() for best in found]
                references += captions
            if rows[-1] + 1 < len(split):  # the last comes with the scores
                self._report("validating", epoch, rows[-1] + 1)
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


def _precision(name: str, device: torch.device) -> torch.autocast:
    is_auto = (
        name == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    return torch.autocast(device.type, torch.bfloat16, enabled=is_auto or name == "bfloat16")


def _groups(num_rows: int) -> Iterator[list[int]]:
    for start in range(0, num_rows, _VALIDATION_ROWS):
        yield list(range(start, min(num_rows, start + _VALIDATION_ROWS)))
