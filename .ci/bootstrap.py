"""Creates a virtual environment with pip in it: ``python3 bootstrap.py FOLDER``.

Debian's python3 alone has no ensurepip (that is in python3-venv), so ``python3 -m venv`` fails there. The environment
is then made without pip, and pip comes from its own wheel, which runs straight from the zip file it is.
"""

from __future__ import annotations

import configparser
import hashlib
import html
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
import venv


def index_url() -> str:
    """Where pip would look for packages: its environment variable, its configuration files, or PyPI."""
    if "PIP_INDEX_URL" in os.environ:
        return os.environ["PIP_INDEX_URL"]
    home = pathlib.Path.home()
    files = [pathlib.Path("/etc/pip.conf"), home / ".pip/pip.conf", home / ".config/pip/pip.conf"]
    parser = configparser.RawConfigParser()
    parser.read([*files, os.environ.get("PIP_CONFIG_FILE", os.devnull)])
    return parser.get("global", "index-url", fallback="https://pypi.org/simple")


def newest_pip() -> tuple[str, str]:
    """Address and SHA-256 of the newest release of pip."""
    page = index_url().rstrip("/") + "/pip/"
    with urllib.request.urlopen(page, timeout=60) as response:
        links = re.findall(r'href="([^"]+)"', response.read().decode())
    found = {}
    for link in map(html.unescape, links):
        match = re.search(r"/pip-(\d+(?:\.\d+)*)-py3-none-any\.whl#sha256=([0-9a-f]{64})", link)
        if match:
            version = tuple(int(part) for part in match[1].split("."))
            found[version] = (urllib.parse.urljoin(page, link.partition("#")[0]), match[2])
    if not found:
        raise SystemExit(f"{page} lists no wheel of pip: install pip yourself (Debian: python3-venv)")
    return found[max(found)]


def install_pip(python: pathlib.Path) -> None:
    """Downloads pip's wheel and has it install itself into the environment of ``python``."""
    address, digest = newest_pip()
    with urllib.request.urlopen(address, timeout=60) as response:
        content = response.read()
    if hashlib.sha256(content).hexdigest() != digest:
        raise SystemExit(f"{address} does not have the digest that the index gives")
    with tempfile.TemporaryDirectory() as folder:
        wheel = pathlib.Path(folder) / address.rpartition("/")[-1]
        wheel.write_bytes(content)
        subprocess.run([python, wheel / "pip", "install", "--quiet", "--no-index", wheel], check=True)


def main(folder: pathlib.Path) -> None:
    if sys.version_info < (3, 10):  # noqa: UP036  (this is where an older Python is told)
        raise SystemExit(f"Python 3.10 or later is needed, this is {sys.version.split()[0]}: make PYTHON=python3.x ...")
    with_pip = importlib.util.find_spec("ensurepip") is not None
    venv.create(folder, clear=True, symlinks=True, with_pip=with_pip)
    if not with_pip:
        install_pip(folder / "bin" / "python")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
