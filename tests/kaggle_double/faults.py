"""Every way in which the double can misbehave, by name; faults combine."""

from __future__ import annotations

from collections.abc import Iterable

from .variants import VARIANTS

FAULTS: dict[str, str] = {
    # credentials
    "no_credentials": "the environment holds no credentials at all",
    "wrong_token": "the server refuses the credentials of the environment with 401",
    # datasets
    "pending_403_forever": "a created dataset answers 403 to its own owner for ever, as if it were still being made",
    "upload_refused": "every upload of a file is refused with 403",
    "upload_dropped": "the first upload of each file is cut off half-way; the next one gets through",
    "create_error": "creating a dataset answers status error in a reply with HTTP 200",
    "version_error": "creating a dataset version answers status error in a reply with HTTP 200",
    "dataset_failed": "the processing of a dataset ends with status failed",
    "never_ready": "a dataset stays in processing for ever",
    "version_never_moves": (
        "status says ready, but version number, file list and files stay those of the version before"
    ),
    "ready_too_early": (
        "right after a new version, status says ready while the version number is still the old one for two calls"
    ),
    "stale_build_id": (
        "version number and file list are new, but a downloaded file is the one of the version before, for ever"
    ),
    "stale_build_id_briefly": "the same for the first two downloads after a new version",
    "missing_file": "one uploaded file other than BUILD_ID.json is lost on the server",
    "files_403_briefly": "the list of a dataset's files is denied (403) the first two times",
    "dataset_public": "the account's datasets have been made public on the site",
    "probe_503_once": "the question how much of an upload has come is answered 503 the first time",
    "probe_silent_once": "the same question is not answered at all the first time",
    "file_zipped": "a single file is downloaded as <name>.zip",
    # kernels
    "kernel_push_error": "saving a kernel answers an error in a reply with HTTP 200, and nothing is saved",
    "invalid_dataset_source": "the kernel is saved, but without one dataset source, named in the reply",
    "invalid_model_source": (
        "the kernel is saved, but without one model source, named in the reply (no client prints it)"
    ),
    "invalid_competition_source": "the kernel is saved, but without one competition source, named in the reply",
    "invalid_kernel_source": "the kernel is saved, but without one kernel source, named in the reply",
    "save_refused_503": "saving a kernel is answered 503, and nothing is saved",
    "save_answer_lost": "saving a kernel is answered 503 although it was saved",
    "save_silent": "a kernel is saved, and the answer never comes",
    "gpu_limit": "two other GPU sessions of the account run for ever, so that no GPU kernel can be started",
    "gpu_limit_briefly": "the same for the first two attempts to start a GPU kernel",
    "quota_used_up": "the week's GPU hours are used up",
    "kernel_fails": "kernels end with status ERROR and a failure message",
    "kernel_completes_without_marker": (
        "kernels end with status COMPLETE, but their log lacks the end marker, as after a crash of a script"
    ),
    "kernel_completes_failed": "kernels end with status COMPLETE, but their end marker says failed",
    "kernel_degraded": "infer kernels end with status COMPLETE and an end marker that says that most slides failed",
    "kernel_stopped": "kernels end with status COMPLETE and an end marker that says stopped",
    "kernel_stale_build_id": (
        "kernels end with status COMPLETE, but their end marker names another build id than the pushed script"
    ),
    "kernel_cancelled": "kernels end with status CANCEL_ACKNOWLEDGED",
    "kernel_never_ends": "kernels stay RUNNING for ever",
    # submissions
    "submission_refused": "a submission is refused with 400",
    "submission_refused_503": "a submission is answered 503, and nothing is taken",
    "submission_answer_lost": "a submission is answered 503 although it was taken",
    "submission_silent": "a submission is taken, and the answer never comes",
    "submission_unknown": "the state of the first submission is denied with 404",
    "submission_error": "a submission is accepted and its scoring ends with ERROR",
    # transport
    "server_500": "every call is answered 500",
    "server_503_briefly": "the first two calls are answered 503",
    "rate_limited_429": "every call is answered 429 with Retry-After",
    "rate_limited_briefly": "the first two calls are answered 429 with Retry-After",
    "network_down": "nothing listens at the server's address",
    **{name: variant.meaning for name, variant in VARIANTS.items()},
}


def checked(names: Iterable[str]) -> frozenset[str]:
    """`names` as a set. ValueError names the ones that are no faults."""
    names = frozenset([names] if isinstance(names, str) else names)
    if unknown := sorted(names - FAULTS.keys()):
        raise ValueError(f"no such fault: {', '.join(unknown)}; the faults are {', '.join(FAULTS)}")
    return names
