"""Packaging of hubmap_kit: a pure-Python wheel.

Exact versions live in constraints.txt; bounds here each carry their reason.
"""

from pathlib import Path

from setuptools import find_packages, setup

REQUIRES = [
    "torch>=2.4",  # torch.amp.GradScaler(device); torch.load(weights_only=True) that takes plain values
    "torchvision>=0.19",  # the release that goes with torch 2.4; timm and smp import it
    "timm>=1.0.9",  # ModelEmaV3 and create_scheduler_v2 as used in training
    "segmentation-models-pytorch>=0.5",  # first release without pretrainedmodels and efficientnet-pytorch
    "albumentations==2.0.8",  # the last MIT release; its argument names and seeding are what augment/ relies on
    "ttach>=0.0.3",  # the only release with d4_transform that still works
    "tifffile>=2024.1.30",  # TiffPage attributes used by competition/slides
    "opencv-python-headless>=4.9",  # needs no display libraries; albumentations asks for the same build
    "numpy>=1.26",  # first release for Python 3.12
    "pandas>=2.2",  # text columns read as str without surprises
    "pyarrow>=14",  # parquet tables of the tile store
    "scikit-learn>=1.4",  # StratifiedGroupKFold
    "pillow>=10",  # text on pictures
    "scipy>=1.11",  # ndimage, for the synthetic slides
    "safetensors>=0.4",  # weights without pickle
    "pydantic>=2.6",  # frozen models with a discriminated error list
    "PyYAML>=6",  # experiment files
    "typer>=0.12",  # the command line
    "click>=8.1",  # what typer stands on; its usage errors are caught
    "rich>=13",  # tables in the terminal
    "tqdm>=4.66",  # progress bars
    "jinja2>=3.1",  # the page of hubmap eda
    "matplotlib>=3.8",  # curves and overlays
]
# Only for the machine that one pushes from: kernels need no client, and the image holds an older one.
PUSH = [
    "kaggle>=2.2.4",  # typed answers to a push, `quota`; 2.2.5 where its certifi can be had
    "six>=1.16",  # kaggle 2.2.4 and 2.2.5 import it without declaring it
    "packaging>=23",  # wheel names and requirements of the bundle
]
# What the kit is measured against. scripts/bench.sh adds pytorch-toolbelt without its dependencies: it would bring in
# opencv-python, whose files overwrite those of the headless build.
BENCH = [
    "pycocotools>=2.0.7",  # run-length encoding in C, the usual oracle
    "rlemasklib>=0.8",  # the fastest run-length library that we know of
    "monai>=1.3",  # sliding_window_inference
    "kornia>=0.7",  # augmentation of batches
    "patchly>=0.0.19",  # the release whose sampler squeezes windows into the picture by itself
]
TUNE = ["optuna>=3.6"]  # resumable studies with pruning
NOTEBOOK = ["papermill>=2.6", "ipykernel>=6"]  # runs the notebook and leaves an executed copy
SINKS = [
    "tensorboard>=2.16",  # the reader of what torch.utils.tensorboard writes
    "wandb>=0.17",  # offline runs
    "nvidia-ml-py>=12",  # use, memory and temperature of a card
]
EXTRAS = {
    "push": PUSH,
    "bench": BENCH,
    "tune": TUNE,
    "notebook": NOTEBOOK,
    "sinks": SINKS,
    "lzw": ["imagecodecs>=2024.1.1"],  # faster LZW and JPEG TIFFs; OpenCV reads them where it is absent
    "test": [
        *PUSH,
        *TUNE,
        *NOTEBOOK,
        *SINKS,
        "pytest>=8",
        "pytest-xdist>=3",
        "hypothesis>=6",
        "pycocotools>=2.0.7",
        "monai>=1.3",
        "imagecodecs>=2024.1.1",
        "ruff>=0.9",
        "mypy>=1.14",
    ],
}

setup(
    name="hubmap-kit",
    version="0.1.0",
    description="Train on HuBMAP + HPA tissue slides and write a valid submission.csv, offline, on Kaggle",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["hubmap_kit", "hubmap_kit.*"]),
    package_data={
        "hubmap_kit": [
            "configs/*.yaml",
            "models/*.csv",
            "notebooks/*.ipynb",
            "report/*.csv",
            "report/*.j2",
            "report/*.js",
            "rehearsal/inside/*.py",  # a folder that is run, not a package
        ]
    },
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["hubmap=hubmap_kit.__main__:command"]},
)
