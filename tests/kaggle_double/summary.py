"""What the double holds, for people."""

from __future__ import annotations

from collections.abc import Iterator

from .double import Double
from .state import Dataset, DatasetVersion, Kernel, KernelVersion


def summary(double: Double) -> str:
    """Datasets with their versions and files, kernels with what was asked and given, submissions, and what this run
    asked for.
    """
    return "\n".join(_lines(double))


def _lines(double: Double) -> Iterator[str]:
    state = double.state
    yield (
        "The double of Kaggle, account"
        f" {double.owner}{', faults: ' + ', '.join(sorted(double.faults)) if double.faults else ''}"
    )
    for dataset in state.datasets.values():
        yield from _dataset(dataset)
    for kernel in state.kernels.values():
        yield from _kernel(kernel)
    for one in state.submissions:
        scores = (
            f", public {one.public_score}, private {one.private_score}"
            if one.public_score
            else f", {one.error}"
            if one.error
            else ""
        )
        yield (
            f"submission {one.ref}: {one.file} of {one.kernel} version {one.version} to {one.competition},"
            f" {one.status}{scores}"
        )
    if not (state.datasets or state.kernels or state.submissions):
        yield "  nothing"
    uploaded = [blob for blob in state.blobs.values() if blob.token in double.server.uploaded]
    size = sum(blob.size for blob in uploaded)
    yield (
        f"this run: requests {len(double.requests)}, files uploaded"
        f" {len(uploaded)}{f' ({size:,} bytes)' if uploaded else ''}"
    )
    yield from (f"tried to leave this computer and was stopped: {what}" for what in double.escapes)
    yield from (f"mistake of the double: {what}" for what in double.mistakes)


def _dataset(dataset: Dataset) -> Iterator[str]:
    yield (
        f"dataset {dataset.owner}/{dataset.slug}: {'private' if dataset.private else 'PUBLIC'}, {dataset.licence},"
        f" {dataset.status.lower()}"
    )
    for version in dataset.versions[:-1]:
        yield f"  version {version.number}: {version.notes} ({_size(version)})"
    last = dataset.versions[-1]
    yield f"  version {last.number}: {last.notes} ({_size(last)})"
    yield from (f"    {file.size:>12,}  {file.name}" for file in last.files)


def _size(version: DatasetVersion) -> str:
    return f"{len(version.files)} files, {sum(file.size for file in version.files):,} bytes"


def _kernel(kernel: Kernel) -> Iterator[str]:
    yield f"kernel {kernel.owner}/{kernel.slug}"
    for version in kernel.versions:
        yield (
            f"  version {version.number}: {version.status}, {_accelerator(version)}, internet"
            f" {'ON' if version.internet else 'off'}"
        )
        for kind, names in version.sources.items():
            if names:
                yield f"    {kind}: {', '.join(names)}"


def _accelerator(version: KernelVersion) -> str:
    asked, given = version.asked.get("machineShape") or "", version.accelerator or "no accelerator"
    return f"{given} (asked for {asked})" if asked and asked != given else given
