"""Metadata, packages, extras and the console script `dino-kd`."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent


def read(name: str) -> str:
    """The text of a file beside this one, empty when there is none."""
    path = HERE / name
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def version() -> str:
    """Read from the source, because importing dino_kd would need its requirements."""
    found = re.search(r'^__version__ = "(.+)"$', read("dino_kd/__init__.py"), re.MULTILINE)
    assert found, "dino_kd/__init__.py holds no __version__"
    return found[1]


# setuptools builds a test runner, so that `pip wheel --no-build-isolation` works in the tests
TEST = ["pytest>=7.4", "setuptools>=70.1", "tensorboard"]
VIDEO = ["av>=14.0"]  # the first that tells how a film is turned
PARQUET = ["pyarrow>=14.0"]
COMPILER = ["ziglang>=0.13"]  # clang for machines that have none; 100 MB

setup(
    name="dino_kd",
    version=version(),
    description="From a folder of unlabelled images to a small model you can ship.",
    long_description=read("README.md"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    # `include`, or a new folder with an __init__.py would be installed by accident
    packages=[
        *find_packages(include=["dino_kd", "dino_kd.*", "eval", "launch"]),
        "dino_kd.configs",
    ],
    package_dir={"dino_kd.configs": "configs"},  # top-level folder, packaged inside dino_kd
    package_data={
        "dino_kd.configs": ["*/*.yaml"],
        "dino_kd": ["py.typed"],
        "dino_kd.data": ["*.cpp"],  # compiled at first use
        "eval": ["templates/*.html"],
    },
    install_requires=[
        "PyYAML>=6.0",
        "annotated-types>=0.6",
        "faiss-cpu>=1.7.4",
        "jinja2>=3.1",  # pages; torch needs it anyway
        "matplotlib>=3.7",
        "numpy>=1.24",
        "pillow>=10.0",
        "pydantic>=2.5",
        "safetensors>=0.4",
        "scikit-learn>=1.3",
        "scipy>=1.9",
        "simplejpeg>=1.6",  # decodes small JPEGs five times faster; used only where it imports
        "submitit>=1.5",
        "timm>=1.0.16",  # the first that reads local-dir:,
        "torch>=2.6",
        "torchvision>=0.21",
        "tqdm>=4.65",
    ],
    extras_require={
        "test": TEST,
        "dev": [
            *TEST,
            *VIDEO,
            *PARQUET,
            "build>=1.0",
            "mypy>=1.8",
            "ruff>=0.6",
            "types-PyYAML",
        ],
        "export": ["onnx>=1.16", "onnxruntime>=1.18", "onnxscript>=0.1"],
        "compiler": COMPILER,
        "video": VIDEO,
        "parquet": PARQUET,
    },
    entry_points={"console_scripts": ["dino-kd=dino_kd.cli:main"]},
)
