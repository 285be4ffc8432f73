"""Images from text on Flickr8k: a VAE, and a GAN that goes on from it, trained and scored on real photos at 64 x 64.

    python benchmarks/flickr8k_images.py --annotation dataset_flickr8k.json --images Images.zip --output flickr8k \
        --text_model bert:sentence-transformers/all-MiniLM-L6-v2 --captioner cnn-lstm:flickr8k/models/attention

Each step is a command of `diptych`, printed as it is run: prepare the splits; train the VAE on the train split, then
the GAN; draw an image of every caption of a split that is not trained on (by default the one that the VAE's best epoch
is chosen by); score. FID is between drawn images and the photos of the captions, on a yardstick of real photos: those
of the train split against the same ones. The captioner (such as `benchmarks/flickr8k.py` makes, which has seen no drawn
image) describes what is drawn, and the text model compares that with the image's prompt, and with another's; the
probe of `text_probe.py`, which is told of photos alone, does so through a blur. Look at samples.png in the models'
folders.
"""

import argparse
import json
import shlex
import time

from flickr8k import add_data_flags, diptych, prepare_splits
from text_probe import TextProbe

from diptych.models.base import TextOptions
from diptych.models.metrics.image_scores import Features
from diptych.models.text.text_model import load_text_model
from diptych.pipelines.demo_data.efficientnet_lite0 import ENCODER

COMMON = shlex.split("--size 64 --ema 0.995 --flips")
VAE = shlex.split(
    "--channels 16 --max_channels 128 --latent_dim 32 --batch_size 16 --learning_rate 1e-3 --divergence_weight 8"
)
GAN = shlex.split("--batch_size 16 --learning_rate 2e-4 --precision bfloat16")


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_flags(parser)
    parser.add_argument("--text_model", required=True, metavar="KIND:LOC")
    parser.add_argument("--captioner", required=True, metavar="KIND:LOC", help="the probe")
    parser.add_argument("--vae_epochs", default="30", metavar="N")
    parser.add_argument("--gan_epochs", default="20", metavar="N")
    parser.add_argument(
        "--max_images", default="1000", metavar="N", help="of each side, for FID and the match"
    )
    args = parser.parse_args()
    out, start = args.output, time.monotonic()
    weights = prepare_splits(args)
    features = ["--features", ENCODER, "--feature_weights", str(weights), "--max_images", args.max_images]
    photos = ["--references", str(out / "test"), "--size", "64", *features]
    scores = {"photos": out / "photos.json"}
    evaluate = ("evaluate", "images", "--input")
    diptych(*evaluate, str(out / "train"), "--dataset", "images", *photos, "--scores", str(scores["photos"]))
    rows = ["--input", str(out / "train"), "--validation", str(out / "validation")]
    seconds = {}
    for kind, flags in (
        ("vae", [*VAE, "--epochs", args.vae_epochs]),
        ("gan", [*GAN, "--epochs", args.gan_epochs, "--generator", f"vae:{out / 'models' / 'vae'}"]),
    ):
        begun = time.monotonic()
        model, drawn = str(out / "models" / kind), str(out / "drawn" / kind)
        told = ["--text_model", args.text_model, "--output", model]
        diptych("train", kind, *rows, *told, *COMMON, *flags)
        seconds[kind] = time.monotonic() - begun
        diptych("generate", "--prompts", str(out / "test"), "--model", f"{kind}:{model}", "--output", drawn)
        scores[kind] = out / f"{kind}.json"
        match = ["--match_with", args.captioner, "--match_by", args.text_model]
        diptych(*evaluate, drawn, *photos, *match, "--scores", str(scores[kind]))
    for name, path in scores.items():
        shown = shlex.join(f"{key}={value}" for key, value in json.loads(path.read_text())["scores"].items())
        print(f"{name:8} {shown}" + (f" training {seconds[name] / 60:.1f} min" if name in seconds else ""))
    kind, _, location = args.text_model.partition(":")
    text = load_text_model(kind, location, TextOptions(), "cpu")
    probe = TextProbe(Features.load(ENCODER, str(weights), "cpu"), text, out / "train")
    looked_at = {"photos": (out / "test", "images")}
    looked_at |= {kind: (out / "drawn" / kind, "generated") for kind in seconds}
    print("own text over others', by a probe of photos:")
    for name, (root, dataset) in looked_at.items():
        print(f"{name:8} {probe.gain(root, dataset, int(args.max_images))}")
    print(f"in all {(time.monotonic() - start) / 60:.1f} min")


if __name__ == "__main__":
    main()
