"""Package metadata: installs the import packages `kernels` and `gptcore`."""

from setuptools import setup

setup(
    name="gptcore",
    version="0.1.0",
    description="GPT training on fused Triton kernels, proven equal to the naive model",
    license="MIT",
    packages=["kernels", "gptcore"],
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy",
        "safetensors",
        "tqdm",
        "matplotlib",
        "tomli; python_version < '3.11'",
    ],
    extras_require={
        "test": [
            *("pytest", "pytest-benchmark", "pytest-xdist", "ruff"),
            *("transformers>=5", "tensorboard", "tiktoken"),  # so that what they do is tested
        ],
        "bpe": ["tiktoken"],
        "tensorboard": ["tensorboard"],
        "wandb": ["wandb"],
    },
)
