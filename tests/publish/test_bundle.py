"""The code bundle: real git, real pip, real wheels."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import hubmap_kit
from hubmap_kit.build_id import read, verify
from hubmap_kit.errors import PublishError
from hubmap_kit.publish import bundle as bundling
from hubmap_kit.publish import bundle as pins
from hubmap_kit.publish.staging import check_flat, fresh_folder
from hubmap_kit.publish.wheels import check_wheels, open_wheel

ROOT = Path(hubmap_kit.__file__).resolve().parents[1]
COMMITTED = ("setup.py", "README.md", "constraints.txt", "datasets-meta", "hubmap_kit")
WHEELS = ("hubmap_kit-0.1.0", "segmentation_models_pytorch-0.6.0", "ttach-0.0.3")
NOWHERE = "http://127.0.0.1:9"  # no proxy and no index lives here


def git(folder: Path, *arguments: str) -> str:
    names = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}
    dates = {"GIT_AUTHOR_DATE": "2024-02-03T04:05:06Z", "GIT_COMMITTER_DATE": "2024-02-03T04:05:06Z"}
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "GIT_CONFIG_NOSYSTEM": "1", **names, **dates}
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout.strip()


def run_bundle(
    tree: Path, out: Path, *arguments: str, umask: int = 0o022, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`hubmap bundle` from a checkout of its own, in a process of its own."""
    command = [sys.executable, "-m", "hubmap_kit", "bundle", "--out", str(out), *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=tree.parent,
        umask=umask,
        env={**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", **environment},
    )


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a refused bundle prints."""
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def wheel_cache() -> Path:
    """The user's own cache with the vendored wheels and the build tools; the network is needed where they are not there
    yet.
    """
    try:
        for name in (bundling.VENDORED, bundling.BUILD_TOOLS):
            pins.fetch(ROOT / name)
    except PublishError as error:
        pytest.skip(f"the wheels to bundle are neither in {pins.default_cache()} nor to be had: {error}")
    return pins.default_cache()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean git checkout of the kit as it is on disk now."""
    folder = tmp_path_factory.mktemp("checkout") / "kit"
    folder.mkdir()
    for name in COMMITTED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copyfile(ROOT / name, folder / name)
    (folder / ".gitignore").write_text("__pycache__/\nbuild/\n")
    for arguments in (("init", "-q"), ("add", "-A"), ("commit", "-q", "-m", "first")):
        git(folder, *arguments)
    return folder


@pytest.fixture
def clone(tree: Path, tmp_path: Path) -> Path:
    """Another checkout of the same commit, that a test may change."""
    git(tmp_path, "clone", "-q", "--no-hardlinks", str(tree), "elsewhere")
    return tmp_path / "elsewhere"


@pytest.fixture(scope="module")
def bundle(tree: Path, wheel_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "code"
    done = run_bundle(tree, folder, umask=0o077, TZ="Asia/Tokyo", LC_ALL="C")
    assert done.returncode == 0, done.stderr
    assert read(folder).build_id in done.stdout and "hubmap push code" in done.stdout
    return folder


def test_one_commit_gives_the_same_bytes_everywhere(bundle: Path, clone: Path, tmp_path: Path) -> None:
    """Other folder, other umask, time zone and file times; left-overs of other builds and files that git does not
    know.
    """
    (clone / "build/lib/hubmap_kit").mkdir(parents=True)
    (clone / "build/lib/hubmap_kit/stale.py").write_text("stale = True")
    (clone / "notes.txt").write_text("password")
    for path in (clone / "hubmap_kit").rglob("*.py"):
        os.utime(path, (1, 1))
    again = tmp_path / "again"
    done = run_bundle(clone, again, umask=0o000, TZ="America/Lima", SOURCE_DATE_EPOCH="1")
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in bundle.iterdir()
    }


def test_it_holds_the_commit_and_nothing_else(bundle: Path, tree: Path) -> None:
    build = verify(bundle)
    sha = git(tree, "rev-parse", "HEAD")
    assert (build.kind, build.git_sha, build.dirty) == ("code", sha, False)
    assert build.build_id.startswith(f"{sha[:12]}-")
    assert {path.name for path in bundle.iterdir()} == {
        "BUILD_ID.json",
        "LICENSES.md",
        *(f"{name}-py3-none-any.whl" for name in WHEELS),
    }
    with zipfile.ZipFile(bundle / f"{WHEELS[0]}-py3-none-any.whl") as wheel:
        packed = {name: wheel.read(name) for name in wheel.namelist() if ".dist-info/" not in name}
        assert {entry.date_time for entry in wheel.infolist()} == {(2024, 2, 3, 4, 5, 6)}
    tracked = [
        name
        for name in git(tree, "ls-files", "hubmap_kit").splitlines()
        if name.endswith((".py", ".csv", ".ipynb", ".j2", ".js")) or "/configs/" in name
    ]
    assert packed == {name: (tree / name).read_bytes() for name in tracked}


def test_the_licences_of_all_wheels_are_in_it(bundle: Path) -> None:
    text = (bundle / "LICENSES.md").read_text()
    for name in WHEELS[1:]:
        with zipfile.ZipFile(bundle / f"{name}-py3-none-any.whl") as wheel:
            licence = next(wheel.read(entry).decode() for entry in wheel.namelist() if entry.endswith("LICENSE"))
        assert "Permission is hereby granted" in licence and licence.strip() in text
    for words in (
        "## segmentation-models-pytorch 0.6.0",
        "## ttach 0.0.3",
        "## hubmap-kit 0.1.0",
        "Licence: MIT",
        "https://github.com/qubvel/ttach",
    ):
        assert words in text


@pytest.fixture(scope="module")
def installed(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle installed into an empty folder as a kernel does it, where possible with networking switched off."""
    target = tmp_path_factory.mktemp("installed") / "site"
    alone = (
        bool(shutil.which("unshare"))
        and not subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode
    )
    apart = ["unshare", "-rn"] if alone else []
    command = ["install", "--no-index", "--no-deps", "--find-links", str(bundle), "--target", str(target)]
    packages = ["hubmap-kit", "segmentation-models-pytorch", "ttach"]
    proxies = {"http_proxy": NOWHERE, "https_proxy": NOWHERE}
    environment = {"PATH": os.environ["PATH"], "HOME": str(target.parent), "PIP_CONFIG_FILE": os.devnull, **proxies}
    done = subprocess.run(
        [*apart, sys.executable, "-m", "pip", *command, *packages],
        capture_output=True,
        text=True,
        check=False,
        cwd=target.parent,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return target


def test_it_installs_offline_and_imports_from_where_it_was_installed(installed: Path) -> None:
    code = f"""
import sys
# The environment of the tests has the checkout on its path; here only what pip has just written may be found.
sys.path[:] = [{str(installed)!r}, *(entry for entry in sys.path if {str(ROOT)!r} != entry)]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
import hubmap_kit, segmentation_models_pytorch, ttach
from hubmap_kit import experiment
from hubmap_kit.config import ModelConfig
from hubmap_kit.models.build import build
network = build(ModelConfig(encoder="tu-test_resnet", options={{"encoder_depth": 3, "decoder_channels": [16, 8, 8]}}))
import json, torch
shape = list(network.eval()(torch.zeros(1, 3, 64, 64)).shape)
files = [module.__file__ for module in (hubmap_kit, segmentation_models_pytorch, ttach)]
from hubmap_kit.publish.root import repository
try:
    repository()
except hubmap_kit.errors.PublishError as error:
    print(json.dumps([sorted(experiment.shipped()), shape, files, str(error)]))
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False, cwd=installed.parent
    )
    assert done.returncode == 0, done.stderr
    configs, shape, files, no_checkout = json.loads(done.stdout.splitlines()[-1])
    assert configs == sorted(path.stem for path in (ROOT / "hubmap_kit/configs").glob("*.yaml"))
    assert shape == [1, 1, 64, 64]
    assert all(file.startswith(str(installed)) for file in files), files
    assert no_checkout.startswith(f"{installed} holds hubmap_kit but no setup.py")


def test_the_record_of_the_wheel_is_right(installed: Path, tree: Path) -> None:
    """Read by the standard library from what pip installed."""
    found = next(d for d in Distribution.discover(path=[str(installed)]) if d.metadata["Name"] == "hubmap-kit")
    hashed = [file for file in found.files or () if file.hash and file.suffix == ".py"]
    assert len(hashed) == len(list((tree / "hubmap_kit").rglob("*.py")))
    for file in hashed:
        digest = hashlib.sha256(file.read_binary()).digest()
        assert file.hash and file.hash.value == base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def test_a_checkout_that_differs_from_its_commit_is_refused(clone: Path, bundle: Path, tmp_path: Path) -> None:
    def refused() -> str:
        done = run_bundle(clone, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return sentence(done)

    new = clone / "hubmap_kit/competition/forgotten.py"
    new.write_text("FORGOTTEN = True\n")
    assert "forgotten.py differs from commit" in refused() and "--allow-dirty" in refused()
    (clone / "hubmap_kit/errors.py").write_text((clone / "hubmap_kit/errors.py").read_text() + "\nCHANGED = True\n")
    assert "competition/forgotten.py and 1 more differs" in refused()
    # Taken as it is only when that is asked for, and marked.
    done = run_bundle(clone, tmp_path / "out", "--allow-dirty")
    assert done.returncode == 0, done.stderr
    build = verify(tmp_path / "out")
    assert build.build_id.partition("-")[2] != read(bundle).build_id.partition("-")[2]
    assert build.dirty and build.build_id.endswith("-dirty") and build.git_sha == git(clone, "rev-parse", "HEAD")
    with zipfile.ZipFile(tmp_path / "out" / f"{WHEELS[0]}-py3-none-any.whl") as wheel:
        assert wheel.read("hubmap_kit/competition/forgotten.py") == new.read_bytes()
        assert b"CHANGED = True" in wheel.read("hubmap_kit/errors.py")


@pytest.mark.parametrize("name", ["huggingface-hub", "timm", "torch", "pandas", "typer"])
def test_a_dependency_that_the_image_lacks_stops_the_bundle(bundle: Path, name: str) -> None:
    wheels = [open_wheel(path) for path in sorted(bundle.glob("*.whl"))]
    image = pins.requirements(ROOT / "constraints.txt")
    check_wheels(wheels, image)
    with pytest.raises(PublishError, match=f"needs {name}[^ ]*, which is neither"):
        check_wheels(wheels, [held for held in image if held.name != name])
    with pytest.raises(PublishError, match=f"needs {name}[^ ]*, and Kaggle's image holds {name}==0.0.1"):
        check_wheels(wheels, [*(held for held in image if held.name != name), Requirement(f"{name}==0.0.1")])


def test_without_git_it_is_refused(tree: Path, tmp_path: Path) -> None:
    shutil.copytree(tree, tmp_path / "plain", ignore=shutil.ignore_patterns(".git"))
    assert "is no git checkout" in sentence(run_bundle(tmp_path / "plain", tmp_path / "out"))


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.txt").write_text("years of work")
    with pytest.raises(PublishError, match="is no staged dataset"), fresh_folder(tmp_path / "thesis"):
        pass
    assert (tmp_path / "thesis/thesis.txt").read_text() == "years of work"


def make_wheel(folder: Path, name: str, *lines: str, metadata_name: str = "", **files: str) -> Path:
    """A wheel file with some METADATA lines; keyword arguments are further files, with __ for / and _dot_ for a dot."""
    path = folder / name
    project, version = name.split("-")[:2]
    header = ["Metadata-Version: 2.1", f"Name: {metadata_name or project}", f"Version: {version}", *lines]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{project}-{version}.dist-info/METADATA", "\n".join(header) + "\n\n")
        archive.writestr(
            f"{project}-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        for key, text in files.items():
            archive.writestr(key.replace("__", "/").replace("_dot_", "."), text)
    return path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("thing-1.0.tar.gz", "is not a wheel"),
        ("thing-1.0.zip", "is not a wheel"),
        ("thing-1.0-cp313-cp313-manylinux_2_28_x86_64.whl", "is a wheel for one platform"),
        ("thing-1.0-cp313-none-any.whl", "is a wheel for one platform or Python"),
        ("thing-1.0-py3-none-linux_x86_64.whl", "is a wheel for one platform"),
        ("thing-1.0.whl", "has no wheel's name"),
        ("thing-1.0-py3-none-any.whl", "is damaged or has no METADATA"),
    ],
)
def test_only_pure_wheels_are_taken(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_bytes(b"no zip file")
    with pytest.raises(PublishError, match=words) as error:
        open_wheel(tmp_path / name)
    assert name in str(error.value)


def test_a_wheel_that_is_not_what_its_name_says_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PublishError, match="holds compiled code .thing/_fast.so"):
        open_wheel(make_wheel(tmp_path, "thing-1.0-py3-none-any.whl", thing___fast_dot_so="ELF"))
    with pytest.raises(PublishError, match="holds other 1.0 under another name"):
        open_wheel(make_wheel(tmp_path, "thing-1.0-py3-none-any.whl", metadata_name="other"))
    with pytest.raises(PublishError, match="cannot be read"):
        open_wheel(make_wheel(tmp_path, "thing-1.0-py3-none-any.whl", "Requires-Dist: what is this"))


IMAGE = """
torch==2.11.0  # pinned
tifffile==2026.3.3; python_version < "3.12"
tifffile==2026.8.16; python_version >= "3.12"
huggingface-hub>=1.5,<2
"""


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("Requires-Dist: torch>=2", None),
        ("Requires-Dist: Torch~=2.11", None),
        ("Requires-Dist: torch==2.10", "image holds torch==2.11.0"),
        ("Requires-Dist: timm", "timm, which is neither in the bundle nor in constraints.txt"),
        ("Requires-Dist: timm; extra == 'all'", None),
        ("Requires-Dist: timm; python_version < '3.11'", None),
        ("Requires-Dist: timm; python_version >= '3.13'", "neither"),
        ("Requires-Dist: timm; sys_platform == 'win32'", None),
        ("Requires-Dist: timm; platform_system == 'Linux'", "neither"),
        ("Requires-Dist: tifffile>=2026.8", "image holds tifffile==2026.3.3"),  # on Python 3.11 only
        ("Requires-Dist: tifffile>=2026.8; python_version > '3.11'", None),
        ("Requires-Dist: huggingface_hub>=0.24", None),
        ("Requires-Dist: huggingface_hub>=1.9", "image holds huggingface-hub"),
        ("Requires-Dist: huggingface_hub<1.9", "image holds huggingface-hub"),  # may hold 1.9 and later
        ("Requires-Dist: other-thing>=2", None),
        ("Requires-Dist: other.thing>=3", "the bundle holds other-thing 2.0"),
        ("Requires-Python: >=3.11", None),
        ("Requires-Python: >=3.12", "wants Python >=3.12"),
        ("Requires-Python: <3.13", "wants Python <3.13"),
    ],
)
def test_everything_that_a_wheel_needs_is_there(tmp_path: Path, line: str, words: str | None) -> None:
    (tmp_path / "constraints.txt").write_text(IMAGE)
    image = pins.requirements(tmp_path / "constraints.txt")
    made = (
        make_wheel(tmp_path, "thing-1.0-py3-none-any.whl", line),
        make_wheel(tmp_path, "other_thing-2.0-py3-none-any.whl"),
    )
    wheels = [open_wheel(path) for path in made]
    if words is None:
        check_wheels(wheels, image)
    else:
        with pytest.raises(PublishError, match=words):
            check_wheels(wheels, image)


def test_two_versions_of_one_package_are_refused(tmp_path: Path) -> None:
    wheels = [open_wheel(make_wheel(tmp_path, f"thing-{version}-py3-none-any.whl")) for version in ("1.0", "2.0")]
    with pytest.raises(PublishError, match="2 wheels of thing"):
        check_wheels(wheels, [])


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tgz", "a.jsonl.gz", "a.tar.bz2", "a.BZ2"])
def test_archives_do_not_go_up(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(PublishError, match="is an archive"):
        check_flat(tmp_path)


def test_a_dataset_is_flat_small_in_number_and_free_of_torch_files(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"{number}.csv").write_text("")
    (tmp_path / "dataset-metadata.json").write_text("{}")  # not uploaded as data
    check_flat(tmp_path)
    (tmp_path / "51.csv").write_text("")
    with pytest.raises(PublishError, match="51 files where Kaggle takes 50"):
        check_flat(tmp_path)
    (tmp_path / "51.csv").rename(tmp_path / "model.pth")
    with pytest.raises(PublishError, match="safetensors"):
        check_flat(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(PublishError, match="flat"):
        check_flat(tmp_path)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")


def test_fetched_wheels_are_kept_and_hashed_at_every_use(wheel_cache: Path, offline: None, tmp_path: Path) -> None:
    vendored = ROOT / bundling.VENDORED
    copy = Path(shutil.copytree(wheel_cache, tmp_path / "cache"))
    found = pins.fetch(vendored, copy)
    assert [path.name for path in found] == [f"{name}-py3-none-any.whl" for name in WHEELS[1:]]
    found[1].write_bytes(found[1].read_bytes() + b"\0")
    with pytest.raises(PublishError, match="connect to the network"):
        pins.fetch(vendored, copy)


def test_a_wheel_with_another_hash_is_not_taken_from_the_index(
    offline: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    index, cache = tmp_path / "index", tmp_path / "cache"
    index.mkdir()
    wheel = make_wheel(index, "thing-1.0-py3-none-any.whl")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    pinned = tmp_path / "pinned.txt"
    pinned.write_text(f"thing==1.0 \\\n    --hash=sha256:{'0' * 64}\n")
    with pytest.raises(PublishError, match="could not be fetched") as error:
        pins.fetch(pinned, cache)
    assert "\n" not in str(error.value) and not list(cache.glob("*.whl"))
    pinned.write_text(f"# the real one\nthing==1.0 --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n")
    assert [path.read_bytes() for path in pins.fetch(pinned, cache)] == [wheel.read_bytes()]


@pytest.mark.parametrize(
    "line", ["thing", "thing==1.0", "thing>=1.0 --hash=sha256:" + "0" * 64, "thing==1.0 --hash=sha256:123", "???"]
)
def test_every_vendored_wheel_is_pinned_by_version_and_hash(tmp_path: Path, line: str) -> None:
    (tmp_path / "pinned.txt").write_text(line + "\n")
    with pytest.raises(PublishError, match="expected name==version"):
        pins.pins(tmp_path / "pinned.txt")
