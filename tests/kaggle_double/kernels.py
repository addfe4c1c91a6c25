"""Kernels: saving versions, their sessions, logs and output files, and the accelerator quota."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote

from slugify import slugify

from .state import Kernel, KernelVersion, find
from .world import Body, Refusal, Silence, World, now

OPEN = ("QUEUED", "RUNNING")
GPU_SESSIONS = 2
# What the server makes of shapes that no longer exist.
RETIRED = {
    "nvidiateslap100": "NvidiaTeslaT4",
    "tpuv38": "TpuV5E8",
    "tpu1vmv38": "TpuV5E8",
    "tpuv232": "",
    "tpuv2256": "",
}
SOURCES = {
    "datasets": ("datasetDataSources", "invalidDatasetSources", "invalid_dataset_source"),
    "competitions": ("competitionDataSources", "invalidCompetitionSources", "invalid_competition_source"),
    "kernels": ("kernelDataSources", "invalidKernelSources", "invalid_kernel_source"),
    "models": ("modelDataSources", "invalidModelSources", "invalid_model_source"),
}


def save(world: World, body: Body) -> Body:
    """Save a version of a kernel and, unless told otherwise, run it."""
    owner, _, slug = (body.get("slug") or "").partition("/")
    world.own(owner)
    title = body.get("newTitle") or slug
    slug = (
        slug if f"{owner}/{slug}" in world.state.kernels else slugify(title)
    )  # a new kernel lands where its title says
    ref = f"{world.owner}/{slug}"
    if ref in world.state.datasets:
        raise Refusal(409, f"The slug {slug} is already in use by a dataset")
    if world.has("save_refused_503"):
        raise Refusal(503, "Service Unavailable")
    accelerator, runs = _accelerator(body), body.get("kernelExecutionType") != "QUICK_SAVE"
    if sentence := _error(world, accelerator if runs else ""):
        return {"error": sentence}
    sources, invalid = _sources(world, body)
    kernel = world.state.kernels.setdefault(ref, Kernel(world.owner, slug, title))
    asked = {name: value for name, value in body.items() if name != "text"}
    version = KernelVersion(
        len(kernel.versions) + 1,
        body.get("text", ""),
        asked,
        accelerator,
        body.get("enableInternet", False),
        sources,
        status="QUEUED" if runs else "NEW_SCRIPT",
        end=_end(world) if runs else "NEW_SCRIPT",
    )
    kernel.versions.append(version)
    if runs:
        _run(world, ref, version)
    if world.has("save_answer_lost"):
        raise Refusal(503, "Service Unavailable")
    if world.has("save_silent"):
        raise Silence
    url = f"https://www.kaggle.com/code/{ref}"
    return {
        "ref": f"/{ref}",
        "url": url,
        "versionNumber": version.number,
        "kernelId": len(world.state.kernels),
        "error": "",
        **invalid,
    }


def _accelerator(body: Body) -> str:
    """The accelerator the server gives, which need not be the one asked for; empty for none."""
    asked = body.get("machineShape") or ""
    if asked.lower() in ("", "none"):
        return "NvidiaTeslaT4" if body.get("enableGpu") else "TpuV5E8" if body.get("enableTpu") else ""
    return RETIRED.get(asked.lower(), asked)


def _error(world: World, accelerator: str) -> str:
    if world.has("kernel_push_error"):
        return "Notebook could not be saved"
    if not accelerator.startswith("Nvidia"):
        return ""
    if world.has("quota_used_up"):
        return f"You have used up your weekly GPU quota of {world.settings.gpu_total_h:.2f} hours."
    running = sum(
        version.status in OPEN and version.accelerator.startswith("Nvidia")
        for kernel in world.state.kernels.values()
        for version in kernel.versions
    )
    if running >= GPU_SESSIONS or world.has("gpu_limit") or world.first("gpu_limit_briefly"):
        return f"Maximum batch GPU session count of {GPU_SESSIONS} reached."
    return ""


def _sources(world: World, body: Body) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The sources that the version gets, and those that the answer calls invalid."""
    made = {
        ref for ref, dataset in world.state.datasets.items() if not (dataset.hidden or world.has("pending_403_forever"))
    }
    known = {
        "datasets": made | set(world.settings.public_datasets),
        "competitions": set(world.settings.competitions),
        "kernels": set(world.state.kernels),
    }
    taken, invalid = {}, {}
    for kind, (asked_as, refused_as, fault) in SOURCES.items():
        asked = body.get(asked_as) or []
        # A dataset can be asked for with a version behind its name; the last one is mounted all the same.
        bad = [name for name in asked if kind in known and "/".join(name.split("/")[:2]) not in known[kind]]
        if world.has(fault) and not bad:
            bad = asked[:1] or ["nobody/nothing"]
        taken[kind], invalid[refused_as] = [name for name in asked if name not in bad], bad
    return taken, invalid


def _end(world: World) -> str:
    if world.has("kernel_fails"):
        return "ERROR"
    return "CANCEL_ACKNOWLEDGED" if world.has("kernel_cancelled") else "COMPLETE"


def _run(world: World, ref: str, version: KernelVersion) -> None:
    """Decide now what the session will have printed and written at its end."""
    slug, text = ref.split("/")[1], version.text
    version.failure = "Your notebook was stopped because it raised an error" if version.end == "ERROR" else ""
    stamped, called = (
        re.search(r"^BUILD_ID\s*=\s*[\"'](.*?)[\"']", text, re.MULTILINE),
        re.search(r"\bstart\(\s*[\"'](\w+)[\"']", text),
    )
    name, build_id = called[1] if called else slug, stamped[1] if stamped else ""
    status = (
        "failed"
        if version.end == "ERROR" or world.has("kernel_completes_failed")
        else "stopped"
        if world.has("kernel_stopped")
        else "complete"
    )
    if world.has("kernel_stale_build_id"):
        build_id = "0123456789ab-0123456789ab"
    degraded = world.has("kernel_degraded") and name == "infer" and status == "complete"
    status, share = ("degraded", " failed=4998/5000") if degraded else (status, "")
    stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    lines = [
        f"HUBMAP START {name} build_id={build_id} utc={stamp}",
        f"the double runs no kernel: this log of version {version.number} is made up",
    ]
    if version.end != "CANCEL_ACKNOWLEDGED" and not world.has("kernel_completes_without_marker"):
        lines.append(f"HUBMAP END {name} {status} build_id={build_id} utc={stamp}{share}")
    version.log = world.logs.get(slug, log(lines))
    weights = re.search(r"^WEIGHTS_ID\s*=\s*[\"'](.+?)[\"']", text, re.MULTILINE)
    facts = {"kernel": name, "status": status, "build_id": build_id, "seconds": 1.0, "sentence": status}
    facts |= ({"weights": [weights[1]]} if weights else {}) | (
        {"failed_slides": 4998, "slides": 5000} if degraded else {}
    )
    written = {"kernel.json": json.dumps(facts).encode()}
    if world.settings.competitions and name == "infer" and status in ("complete", "degraded"):
        written["submission.csv"] = b"id,rle\n10078,\n"
    version.files = [world.state.add(file, content) for file, content in world.outputs.get(slug, written).items()]


def log(lines: list[str]) -> str:
    """Lines of standard output in the form of Kaggle's stored logs: a JSON array with one object per line of text."""
    events = [
        {"stream_name": "stdout", "time": round(1.0 + number / 10, 1), "data": line + "\n"}
        for number, line in enumerate(lines)
    ]
    return "[" + "\n,".join(json.dumps(event) for event in events) + "\n]"


def _version(world: World, body: Body) -> KernelVersion:
    """The version that a call asks for: the last one, or `versionLabel` (`v3`; the bare number is unknown to the
    API).
    """
    kernel = world.state.kernels.get(f"{body.get('userName', '')}/{body.get('kernelSlug', '')}")
    if kernel is None:
        raise Refusal(403, "Permission 'kernels.get' was denied")
    label = body.get("versionLabel") or f"v{len(kernel.versions)}"
    number = int(label[1:]) if re.fullmatch(r"v\d+", label) else 0
    if not 0 < number <= len(kernel.versions):
        raise Refusal(404, "Not found")
    return kernel.versions[number - 1]


def status(world: World, body: Body) -> Body:
    """Status of a session; each call moves it one step on."""
    version = _version(world, body)
    advance(world, version)
    return {"status": version.status, "failureMessage": version.failure if version.status == "ERROR" else ""}


def advance(world: World, version: KernelVersion) -> None:
    """One step of queued -> running -> end."""
    if version.status not in OPEN:
        return
    version.polls += 1
    queued = world.settings.polls_queued
    if version.polls <= queued:
        version.status = "QUEUED"
    elif version.polls <= queued + world.settings.polls_running or world.has("kernel_never_ends"):
        version.status = "RUNNING"
    else:
        version.status = version.end


def output(world: World, body: Body) -> Body:
    """One page of output files, and the log; both are empty while the session is open."""
    version = _version(world, body)
    if version.status in OPEN or version.status == "NEW_SCRIPT":
        return {"files": [], "log": "", "nextPageToken": ""}
    start, size = int(body.get("pageToken") or 0), int(body.get("pageSize") or 100)
    ref = f"{body['userName']}/{body['kernelSlug']}"
    base = f"http://localhost/output/{ref}/{version.number}"
    page = [
        {"fileName": file.name, "url": f"{base}/{quote(file.name)}"} for file in version.files[start : start + size]
    ]
    return {
        "files": page,
        "log": version.log,
        "nextPageToken": str(start + size) if start + size < len(version.files) else "",
    }


def written(world: World, path: str) -> Path:
    """The stored file behind an output path `owner/slug/version/name`."""
    owner, slug, number, name = path.split("/", 3)
    return world.state.path(find(world.state.kernels[f"{owner}/{slug}"].versions[int(number) - 1].files, name))


def stream(world: World, path: str) -> tuple[str, str]:
    """Content type and text of `logs -f` for `owner/slug`: events of an open session, which this call ends, or the
    stored log.
    """
    owner, _, slug = path.partition("/")
    version = _version(world, {"userName": owner, "kernelSlug": slug})
    if version.status not in OPEN or world.has("kernel_never_ends"):
        return "application/json", version.log
    version.status = version.end
    return "text/event-stream", "".join(_events(version.log))


def _events(text: str) -> Iterator[str]:
    for event in json.loads(text):
        yield f"data: {json.dumps(event)}\n\n"
    yield "data: END_OF_LOG\n\n"


def quota(world: World, body: Body) -> Body:
    """Accelerator hours of the week, as protobuf durations; refreshed on the next Saturday, 00:00 UTC."""
    settings, today = world.settings, datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    used = settings.gpu_total_h if world.has("quota_used_up") else settings.gpu_used_h
    refresh = today + timedelta(days=(5 - today.weekday()) % 7 or 7)
    return {
        "quotaRefreshTime": refresh.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "gpuQuota": {
            "timeUsed": f"{round(used * 3600)}s",
            "totalTimeAllowed": f"{round(settings.gpu_total_h * 3600)}s",
        },
        "tpuQuota": {"timeUsed": "0s", "totalTimeAllowed": "72000s"},
    }


def pull(world: World, body: Body) -> Body:
    """Text and settings of a kernel."""
    version, ref = _version(world, body), f"{body['userName']}/{body['kernelSlug']}"
    kernel = world.state.kernels[ref]
    facts = {
        name: version.asked[name]
        for name in ("language", "kernelType", "isPrivate", "enableGpu", "enableInternet")
        if name in version.asked
    }
    sources = {asked_as: version.sources[kind] for kind, (asked_as, _, _) in SOURCES.items()}
    meta = {
        "ref": ref,
        "slug": kernel.slug,
        "title": kernel.title,
        "author": kernel.owner,
        "lastRunTime": now(),
        "currentVersionNumber": len(kernel.versions),
        "machineShape": version.accelerator,
        **facts,
        **sources,
    }
    blob = {
        "source": version.text,
        "slug": kernel.slug,
        **{name: facts[name] for name in ("language", "kernelType") if name in facts},
    }
    return {"metadata": meta, "blob": blob}


SERVICE = "kernels.KernelsApiService/"
METHODS = {
    SERVICE + "SaveKernel": save,
    SERVICE + "GetKernelSessionStatus": status,
    SERVICE + "ListKernelSessionOutput": output,
    SERVICE + "GetAcceleratorQuotaStatistics": quota,
    SERVICE + "GetKernel": pull,
}
