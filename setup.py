"""Packaging. `kernels/` installs as `twostage.kernels`; the bare name is another package's."""

from pathlib import Path

from setuptools import setup

REQUIRED = [
    "torch>=2.11,<2.14",
    "tokenizers>=0.22",
    "safetensors>=0.5",
    "numpy>=1.26",
    "httpx>=0.27",
]
PLOT = ["matplotlib>=3.8"]
# The rivals in the benchmarks; Trainer's `train_sampling_strategy` is as young as that.
BENCH = ["transformers>=5.2", "accelerate>=1.0", "openai>=1.60"]
# The oracles that the tests compare with. The package itself never imports one of them.
TEST = [
    *PLOT,
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    *BENCH,
    "scikit-learn>=1.5",
    "pandas>=2.2",
    "triton>=3.6,<3.10; platform_system == 'Linux'",
    "setuptools>=77",
    "ruff==0.17.6",
    "mypy==2.4.1",
]

setup(
    name="twostage",
    version="0.1.0",
    description="Two-stage fine-tuning of BERT for class-imbalanced text, from scratch in PyTorch",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=[
        "twostage",
        "twostage.assets",
        "twostage.augmentation",
        "twostage.data",
        "twostage.fast",
        "twostage.kernels",
        "twostage.model",
        "twostage.training",
    ],
    package_dir={"twostage": "twostage", "twostage.kernels": "kernels"},
    package_data={"twostage": ["py.typed"]},
    install_requires=REQUIRED,
    extras_require={
        "demo": PLOT,
        "plot": PLOT,
        "test": TEST,
        "export": ["onnx>=1.16", "onnxruntime>=1.20"],
        "bench": [*BENCH, "pytest>=8", "hypothesis>=6.100"],
    },
    entry_points={"console_scripts": ["twostage=twostage.cli:main"]},
)
