"""What `brainloom doctor` checks on this machine: packages, versions, disk, memory, GPUs and storage rights."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import uuid
from importlib import metadata, util
from pathlib import Path

from packaging.requirements import Requirement

from infra import storage
from infra.clusters import ClusterError, worker_count
from infra.findings import Finding
from infra.settings import CGROUP_MEMORY_LIMIT, Settings, machine_memory

PACKAGES = ("brainloom", "flows", "tasks", "models", "infra")
MIN_DISK_GB = 5.0
MIN_SHARED_MIB = 512
MIN_WORKER_GIB = 1.0
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - shared memory, not a temporary file
DRIVER = Path("/proc/driver/nvidia/version")


def check_packages() -> list[Finding]:
    """Packages with our names that come from elsewhere, e.g. a `models/` of the working directory."""
    homes = {}
    for name in PACKAGES:
        spec = util.find_spec(name)
        homes[name] = Path(spec.origin).parent.parent if spec and spec.origin else None
    ours = homes["brainloom"]
    return [
        Finding(
            "packages",
            f"package `{name}` comes from {home}, not from {ours}",
            "leave that folder or set PYTHONSAFEPATH=1",
        )
        for name, home in homes.items()
        if home != ours
    ] or [Finding("packages", f"all of ours come from {ours}")]


def check_versions(distribution: str = "brainloom") -> list[Finding]:
    """Installed versions outside the bounds of pyproject.toml, which is what was tested; absent packages."""
    wanted = [Requirement(line) for line in metadata.requires(distribution) or []]
    needed = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    problems = []
    for one in needed:
        try:
            version = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            version = "absent"
        if version == "absent" or not one.specifier.contains(version, prereleases=True):
            bounds = f"{one.name}{one.specifier}"
            problems.append(
                Finding("versions", f"{one.name} is {version}, tested is {bounds}", f"pip install '{bounds}'")
            )
    return problems or [Finding("versions", f"{len(needed)} packages are within the tested bounds")]


def check_disk(folders: dict[str, Path], minimum_gb: float = MIN_DISK_GB) -> list[Finding]:
    """Free space of the disks of some folders, by what they are for; one that is not there yet counts as its parent."""
    findings = []
    for what, folder in folders.items():
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free / 1e9
        text = f"{free:.1f} GB free for {what} at {folder}"
        short = f"make room, or put it elsewhere; {minimum_gb:g} GB are needed" if free < minimum_gb else ""
        if not os.access(there, os.W_OK):
            text, short = f"{what} at {folder} cannot be written", f"chown {os.getuid()} {there}"
        findings.append(Finding("disk", text, short))
    return findings


def check_shared_memory(place: Path = SHARED_MEMORY, minimum_mib: float = MIN_SHARED_MIB) -> list[Finding]:
    """Room in shared memory: loader processes pass their batches through it."""
    if not place.is_dir():
        return [Finding("shared memory", f"{place} is not there", "mount a tmpfs there (docker run --shm-size 2g)")]
    size = shutil.disk_usage(place).total / 2**20
    mend = (
        f"docker run --shm-size 2g, or shm_size in compose; {minimum_mib:g} MiB are needed"
        if size < minimum_mib
        else ""
    )
    return [Finding("shared memory", f"{place} has {size:.0f} MiB", mend)]


def check_memory(settings: Settings, minimum_gib: float = MIN_WORKER_GIB) -> list[Finding]:
    """Memory of the machine or of its control group against the workers of cluster `local`."""
    total = machine_memory() / 2**30
    source = CGROUP_MEMORY_LIMIT if CGROUP_MEMORY_LIMIT.exists() else Path("/proc/meminfo")
    text = f"{total:.1f} GiB ({source})"
    if settings.cluster != "local":
        return [Finding("memory", text)]
    each = settings.memory_per_worker() / 2**30
    text += f", {settings.workers} Dask workers of {each:.1f} GiB"
    fewer = f"export BRAINLOOM_WORKERS={max(1, int(total * 0.8 / max(each, minimum_gib)))}"
    if each * settings.workers > total:
        return [Finding("memory", f"{text} are more than there is", f"{fewer}, or a lower BRAINLOOM_WORKER_MEMORY")]
    return [Finding("memory", text, f"{fewer}; a worker needs {minimum_gib:g} GiB" if each < minimum_gib else "")]


def check_gpus(settings: Settings, driver: Path = DRIVER) -> list[Finding]:
    """Driver, torch and dask-cuda: what is there must work, and what the settings ask for must be there."""
    cuda = importlib.import_module("torch").cuda
    count = int(cuda.device_count()) if cuda.is_available() else 0
    names = ", ".join(cuda.get_device_name(k) for k in range(count))
    findings = [Finding("GPUs", f"torch sees {count}: {names}" if count else "torch sees none")]
    if driver.exists() and not count:
        what = "there is an NVIDIA driver, but torch sees no GPU"
        findings = [Finding("GPUs", what, "install the CUDA build of torch, and see CUDA_VISIBLE_DEVICES")]
    if settings.cluster == "cuda":
        try:
            findings.append(Finding("GPUs", f"dask-cuda sees {worker_count(settings)}"))
        except ClusterError as error:
            findings.append(
                Finding("GPUs", str(error), "export BRAINLOOM_CLUSTER=local, or pip install 'brainloom[cuda]'")
            )
    return findings


def check_storage(url: str) -> list[Finding]:
    """Rights below a URL: create once only, write, read, list and delete a probe, which does not stay behind.

    Stores need all of them; a second creation must be refused, or two flows could write one store. S3 is asked once
    for each, and local folders that are not there yet are removed again.
    """
    try:
        made = _absent_folders(url)
    except ValueError as error:
        return [Finding("storage", str(error), "correct what is named")]
    try:
        with storage.one_attempt():
            return [_probe(url, f"; {made[0]} is not there yet, and was removed again" if made else "")]
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # it could not be made, or somebody else put something into it
                folder.rmdir()


def _absent_folders(url: str) -> list[Path]:
    """Return a local folder and its parents as far as they are not there, the deepest first; none on S3."""
    if not storage.is_local(url):
        return []
    folder = storage.local_path(url)
    return [path for path in (folder, *folder.parents) if not os.access(path, os.F_OK)]


def _probe(url: str, more: str) -> Finding:
    name = f".brainloom-probe-{uuid.uuid4().hex}"
    probe = storage.join(url, name)
    steps = (
        ("create", lambda: storage.create_exclusive(probe, b"1")),
        ("refuse a second creation of", lambda: not storage.create_exclusive(probe, b"2")),
        ("write", lambda: _written(probe, b"3")),
        ("read", lambda: storage.read_bytes(probe) == b"3"),
        ("list", lambda: name in storage.listdir(url)),
        ("delete", lambda: _deleted(probe)),
    )
    for verb, step in steps:
        mend = f"give this user the right to {verb} objects there, see docs/operating.md"
        try:
            problem = "" if step() else "the answer is wrong"
        except (OSError, ValueError) as error:
            problem, mend = str(error), _storage_mend(error) or mend
        if problem:
            left = "" if verb == "create" else f"; delete {probe} by hand if it is still there"
            return Finding("storage", f"cannot {verb} a probe below {url}: {problem}", f"{mend}{left}")
    return Finding("storage", f"a probe below {url} was created, written, read, listed and deleted{more}")


def _storage_mend(error: OSError | ValueError) -> str:
    """Return what to do about an error of storage; empty when it is a right that is missing."""
    if isinstance(error, ValueError):
        return "correct what is named"
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "correct the path: no folder can be made there"
    if not isinstance(error, storage.StorageError) or error.kind == "rights":
        return ""
    if error.kind == "away":
        return f"start {storage.s3_host()}, or correct {storage.endpoint_variable()}"
    return error.advice


def _written(url: str, data: bytes) -> bool:
    storage.write_bytes(url, data)
    return True


def _deleted(url: str) -> bool:
    storage.delete(url)
    return not storage.exists(url)
