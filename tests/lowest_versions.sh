#!/usr/bin/env bash
# Runs the tests with the lowest versions that setup.cfg declares: every ">=" there becomes a "==".
#
#     tests/lowest_versions.sh [ENVIRONMENT]
#
# ENVIRONMENT is where to make (or find again) the virtual environment; without it, one is made and removed.
# The lowest torch comes with its CUDA libraries: about 4 GB to download, 7 GB on disk.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
environment=${1:-$scratch/venv}

python3 -m venv "$environment"
# Python's own reader of setup.cfg, so that the floors are written down in one place only.
"$environment/bin/python" - > "$scratch/lowest.txt" <<'PYTHON'
import configparser
import re

config = configparser.ConfigParser()
config.read("setup.cfg", encoding="utf-8")
text = "\n".join([config["options"]["install_requires"], *config["options.extras_require"].values()])
for name, version in sorted(set(re.findall(r"^([\w.-]+)>=([\d.]+)", text, re.MULTILINE))):
    print(f"{name}=={version}")
PYTHON
cat "$scratch/lowest.txt"

"$environment/bin/python" -m pip install --quiet --upgrade pip
"$environment/bin/python" -m pip install --quiet --constraint "$scratch/lowest.txt" -e ".[test,recipes]"
HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 "$environment/bin/python" -m pytest -m "not real"
