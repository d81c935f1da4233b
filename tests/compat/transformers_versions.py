"""Run tests against other versions of transformers or accelerate without building another environment.

    python tests/compat/transformers_versions.py 5.2.0 5.17.0 newest
    python tests/compat/transformers_versions.py accelerate==1.6.0 --tests tests/test_distributed.py

For each version a folder gets that package and those of its requirements that the environment does not meet, and
goes in front of the environment for one run of pytest. The exit code is 1 if any run failed.
"""

import argparse
import importlib.metadata
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


ROOT = Path(__file__).parents[2]
TESTS = ("tests/test_registration.py", "tests/test_trainer.py")


def find_distribution(name, overlay):
    """Return the distribution that an import would get with `overlay` in front of the environment, or None."""
    wanted = canonicalize_name(name)
    for distribution in importlib.metadata.distributions(path=[str(overlay), *sys.path]):
        if canonicalize_name(distribution.metadata["Name"] or "") == wanted:
            return distribution
    return None


def unmet(requirement, overlay):
    distribution = find_distribution(requirement.name, overlay)
    return distribution is None or not requirement.specifier.contains(distribution.version, prereleases=True)


def requirements_of(name, overlay):
    """Return what an installed distribution requires here, without its extras."""
    texts = find_distribution(name, overlay).requires or []
    requirements = [Requirement(text) for text in texts]
    return [each for each in requirements if each.marker is None or each.marker.evaluate({"extra": ""})]


def build_overlay(package, overlay):
    """Install a package into `overlay`, then whatever is missing or has the wrong version, level by level."""
    missing = [package]
    while missing:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", overlay]
        subprocess.run([*command, *(str(each) for each in missing)], check=True)
        required = [below for each in missing for below in requirements_of(each.name, overlay)]
        missing = [each for each in required if unmet(each, overlay)]


def run_tests(name, overlay, tests, options):
    """Return the exit code of pytest with `overlay` in front, after checking that it is what gets imported."""
    path = os.pathsep.join([str(overlay), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": path}
    check = (
        "import importlib, sys; sys.exit(not importlib.import_module(sys.argv[1]).__file__.startswith(sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-c", check, name, str(overlay)], env=environment, cwd=ROOT, check=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *tests]
    return subprocess.run(command, env=environment, cwd=ROOT).returncode


def try_version(version, tests, options):
    """Return (the line of the summary, whether the tests passed) for one version."""
    newest = "transformers" if version == "newest" else f"transformers=={version}"
    package = Requirement(version if version[0].isalpha() and version != "newest" else newest)
    with tempfile.TemporaryDirectory(prefix=f"{package.name}-") as folder:
        overlay = Path(folder).resolve()
        print(f"--- {package}", flush=True)
        try:
            build_overlay(package, overlay)
            code = run_tests(package.name, overlay, tests, options)
        except subprocess.CalledProcessError as error:
            return f"{package}: FAILED before the tests, exit code {error.returncode} of {error.cmd[:6]}", False
        installed = sorted(f"{each.name}=={each.version}" for each in importlib.metadata.distributions(path=[folder]))
    return f"{' '.join(installed)}: {'passed' if code == 0 else f'FAILED, exit code {code}'}", code == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="+", help='of transformers, or "newest"; accelerate==1.6.0')
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files of tests, relative to the repository")
    arguments, options = parser.parse_known_args()
    results = [try_version(version, arguments.tests, options) for version in arguments.versions]
    python = ".".join(map(str, sys.version_info[:3]))
    print(f"--- Python {python}, torch {importlib.metadata.version('torch')}")
    print("\n".join(line for line, _ in results))
    return 0 if all(passed for _, passed in results) else 1


if __name__ == "__main__":
    sys.exit(main())
