"""Other answers that the server may give: one table, name -> method and change of its answer.

A new variant is one entry.

A change works on the answer after the method was carried out, unless it refuses: then nothing was. The unchanged answer
is still checked against kagglesdk's types; the changed one need not fit them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass

from .world import Body, Refusal


@dataclass(frozen=True)
class Raw:
    """An answer that is no JSON object, or comes with another status; status 0: the connection breaks off instead,
    after `content`.
    """

    content: bytes
    status: int = 200
    kind: str = "application/json"


@dataclass(frozen=True)
class Variant:
    """Another answer to `method`, for its first `times` calls (0: all).

    `before`: `change` gets an empty answer, and nothing is written.
    """

    method: str
    words: str
    change: Callable[[Body], Body | Raw]
    times: int = 0
    before: bool = False

    @property
    def meaning(self) -> str:
        """What `--list-faults` says."""
        return f"{self.method}{f', first {self.times}' if self.times else ''}: {self.words}"


def put(method: str, times: int = 0, **values: object) -> Variant:
    """Fields of the answer get other values; `a__b` is field b of the object a."""

    def change(answer: Body) -> Body:
        answer = copy.deepcopy(answer)
        for name, value in values.items():
            *outer, last = name.split("__")
            inside = answer
            for key in outer:
                inside = inside.setdefault(key, {})
            inside[last] = value
        return answer

    return Variant(
        method,
        ", ".join(f"{name.replace('__', '.')} is {json.dumps(value)}" for name, value in values.items()),
        change,
        times,
    )


def without(method: str, *names: str) -> Variant:
    """Fields of the answer are left out; `a__b` is field b of the object a."""

    def change(answer: Body) -> Body:
        answer = copy.deepcopy(answer)
        for name in names:
            *outer, last = name.split("__")
            inside = answer
            for key in outer:
                inside = inside.get(key, {})
            inside.pop(last, None)
        return answer

    return Variant(method, f"without {', '.join(names).replace('__', '.')}", change)


def each(method: str, field: str, **values: object) -> Variant:
    """Fields of every object in a list of the answer get other values; None leaves them out."""

    def change(answer: Body) -> Body:
        items = [
            {name: value for name, value in {**item, **values}.items() if value is not None}
            for item in answer.get(field, [])
        ]
        return {**answer, field: items}

    return Variant(
        method,
        f"in each of {field}, " + ", ".join(f"{name} is {json.dumps(value)}" for name, value in values.items()),
        change,
    )


def raw(method: str, content: bytes, status: int = 200, kind: str = "application/json", times: int = 0) -> Variant:
    """Something else in place of the JSON, although the method was carried out."""
    return Variant(
        method,
        f"carried out, and answered {status} with {content.decode()!r}",
        lambda _: Raw(content, status, kind),
        times,
    )


def broken(method: str, content: bytes = b"") -> Variant:
    """The connection breaks off before or within the answer, although the method was carried out."""
    return Variant(
        method,
        f"carried out, and the connection breaks off after {len(content)} bytes of the answer",
        lambda _: Raw(content, 0),
    )


def refused(method: str, status: int, message: str = "Permission was denied", times: int = 0) -> Variant:
    """An HTTP error, and nothing was carried out."""

    def change(_: Body) -> Body:
        raise Refusal(status, message)

    return Variant(method, f"refused with {status} ({message})", change, times, before=True)


def logged(words: str, form: Callable[[list[Body]], object]) -> Variant:
    """The log of a session in another form than the usual list of pieces."""

    def change(answer: Body) -> Body:
        return {**answer, "log": form(json.loads(answer["log"]))} if answer.get("log") else answer

    return Variant("ListKernelSessionOutput", words, change)


def _halves(pieces: list[Body]) -> str:
    last = pieces[-1]["data"]
    return json.dumps([*pieces[:-1], {**pieces[-1], "data": last[:20]}, {**pieces[-1], "data": last[20:]}])


HTML, TEXT = b"<html>Welcome</html>", "text/html; charset=utf-8"
BUSY = "Maximum batch GPU session count of 2 reached."
VARIANTS: dict[str, Variant] = {
    "save_html": raw("SaveKernel", HTML, kind=TEXT),
    "save_not_json": raw("SaveKernel", b"{"),
    "save_nothing": raw("SaveKernel", b""),
    "save_list": raw("SaveKernel", b"[]"),
    "save_null": raw("SaveKernel", b"null"),
    "save_500": raw("SaveKernel", b"{}", 500),
    "save_408": raw("SaveKernel", b"{}", 408),
    "save_302": raw("SaveKernel", HTML, 302, TEXT),
    "save_hung_up": broken("SaveKernel"),
    "save_cut_off": broken("SaveKernel", b'{"ref": "/alice/hub'),
    "save_code_500": raw("SaveKernel", b'{"code": 500, "message": "Internal error"}'),
    "save_empty": raw("SaveKernel", b"{}"),
    "save_null_lists": put(
        "SaveKernel",
        invalidTags=None,
        invalidDatasetSources=None,
        invalidCompetitionSources=None,
        invalidKernelSources=None,
        invalidModelSources=None,
        error=None,
    ),
    "save_no_version": without("SaveKernel", "versionNumber"),
    "save_null_version": put("SaveKernel", versionNumber=None),
    "save_version_and_error": put("SaveKernel", error="Some tags were not saved"),
    "save_ref_and_error": Variant(
        "SaveKernel",
        "carried out, with a ref and an error but no number",
        lambda answer: (
            {name: value for name, value in answer.items() if name != "versionNumber"} | {"error": "Some tags"}
        ),
    ),
    "save_half_character": put("SaveKernel", url="https://www.kaggle.com/code/\ud83d"),
    "save_ref_slug": put("SaveKernel", ref="hubmap-train"),
    "save_ref_code": put("SaveKernel", ref="/code/alice/hubmap-train"),
    "save_ref_query": put("SaveKernel", ref="/code/alice/hubmap-train?scriptVersionId=7"),
    "save_ref_version": put("SaveKernel", ref="alice/hubmap-train/1"),
    "save_ref_address": put("SaveKernel", ref="https://www.kaggle.com/code/Alice/Hubmap-Train"),
    "save_ref_number": put("SaveKernel", ref=123),
    "save_no_ref": without("SaveKernel", "ref", "url"),
    "save_busy_400": refused("SaveKernel", 400, BUSY),
    "save_400": refused("SaveKernel", 400, "Invalid notebook"),
    "submit_no_ref": without("CreateCodeSubmission", "ref"),
    "submit_null_ref": put("CreateCodeSubmission", ref=None),
    "submit_text_ref": put("CreateCodeSubmission", ref="500001"),
    "submit_html": raw("CreateCodeSubmission", HTML, kind=TEXT),
    "submit_nothing": raw("CreateCodeSubmission", b""),
    "submit_code_503": raw("CreateCodeSubmission", b'{"code": 503, "message": "Try later"}'),
    "submit_500": raw("CreateCodeSubmission", b"{}", 500),
    "submit_hung_up": broken("CreateCodeSubmission"),
    "submit_cut_off": broken("CreateCodeSubmission", b'{"message": "Succ'),
    "submit_busy_429": refused("CreateCodeSubmission", 429, "Too many requests"),
    "submissions_400": refused("ListSubmissions", 400),
    "submissions_403": refused("ListSubmissions", 403),
    "submissions_500": refused("ListSubmissions", 500),
    "submissions_html": raw("ListSubmissions", HTML, kind=TEXT),
    "submissions_null": put("ListSubmissions", submissions=None),
    "submissions_empty": put("ListSubmissions", submissions=[]),
    "submissions_odd_date": each("ListSubmissions", "submissions", date="yesterday"),
    "submissions_odd_status": each("ListSubmissions", "submissions", status="RESCORING"),
    "submissions_no_message": each("ListSubmissions", "submissions", description=None),
    "submissions_cut_message": each("ListSubmissions", "submissions", description="hel"),
    "submissions_escaped_message": each("ListSubmissions", "submissions", description="hello &amp; you"),
    "submissions_of_numbers": put("ListSubmissions", submissions=[1, None, "x", []]),
    "submissions_object": put("ListSubmissions", submissions={"a": 1}),
    "submissions_no_ref": each("ListSubmissions", "submissions", ref=None),
    "submissions_text_ref": each("ListSubmissions", "submissions", ref="x"),
    "submissions_endless": put("ListSubmissions", nextPageToken="more"),
    "submission_odd_status": put("GetSubmission", status="QUEUED_FOR_SCORING", publicScore="", privateScore=""),
    "submission_no_status": without("GetSubmission", "status"),
    "submission_odd_date": put("GetSubmission", date="yesterday"),
    "submission_404_first": refused("GetSubmission", 404, times=3),
    "limits_403": refused("GetSubmissionLimits", 403),
    "limits_nulls": put("GetSubmissionLimits", numToday=None, numTotal="many", numAllowedNow=None),
    "quota_403": refused("GetAcceleratorQuotaStatistics", 403),
    "quota_404": refused("GetAcceleratorQuotaStatistics", 404),
    "quota_500": refused("GetAcceleratorQuotaStatistics", 500),
    "quota_html": raw("GetAcceleratorQuotaStatistics", HTML, kind=TEXT),
    "quota_null": put("GetAcceleratorQuotaStatistics", gpuQuota=None, quotaRefreshTime=None),
    "quota_odd_duration": put(
        "GetAcceleratorQuotaStatistics", gpuQuota__timeUsed="a while", gpuQuota__totalTimeAllowed="P1D"
    ),
    "quota_odd_date": put("GetAcceleratorQuotaStatistics", quotaRefreshTime="next Saturday"),
    "quota_old_date": put("GetAcceleratorQuotaStatistics", quotaRefreshTime="0001-01-01T00:00:00Z"),
    "dataset_no_private": without("GetDataset", "isPrivate"),
    "dataset_null_private": put("GetDataset", isPrivate=None),
    "dataset_no_version": without("GetDataset", "currentVersionNumber"),
    "dataset_old_version": put("GetDataset", currentVersionNumber=1),
    "dataset_odd_facts": put(
        "GetDataset", lastUpdated="just now", tags=None, totalBytes="many", licenseName=7, currentVersionNumber="x"
    ),
    "dataset_403": refused("GetDataset", 403),
    "dataset_500": refused("GetDataset", 500),
    "dataset_html": raw("GetDataset", HTML, kind=TEXT),
    "dataset_status_unknown": put("GetDatasetStatus", status="PUBLISHED"),
    "dataset_status_null": put("GetDatasetStatus", status=None),
    "dataset_status_number": put("GetDatasetStatus", status=6),
    "dataset_status_400": refused("GetDatasetStatus", 400, "Bad request"),
    "dataset_status_500": refused("GetDatasetStatus", 500),
    "create_ok_in_words": put("CreateDataset", status="Created"),
    "create_no_status": without("CreateDataset", "status"),
    "create_html": raw("CreateDataset", HTML, kind=TEXT),
    "create_503": raw("CreateDataset", b"{}", 503),
    "create_hung_up": broken("CreateDataset"),
    "create_403_once": refused("CreateDataset", 403, times=1),
    "version_no_status": without("CreateDatasetVersion", "status"),
    "version_html": raw("CreateDatasetVersion", HTML, kind=TEXT),
    "version_503": raw("CreateDatasetVersion", b"{}", 503),
    "version_hung_up": broken("CreateDatasetVersion"),
    "version_403_once": refused("CreateDatasetVersion", 403, times=1),
    "version_403": refused("CreateDatasetVersion", 403),
    "version_refused_503": refused("CreateDatasetVersion", 503),
    "blob_html_first": raw("StartBlobUpload", HTML, kind=TEXT, times=1),
    "blob_500_first": refused("StartBlobUpload", 500, times=2),
    "blob_no_token": without("StartBlobUpload", "token"),
    "blob_no_address": without("StartBlobUpload", "createUrl"),
    "files_403": refused("ListDatasetFiles", 403),
    "files_500": refused("ListDatasetFiles", 500),
    "files_none": put("ListDatasetFiles", datasetFiles=[], nextPageToken=""),
    "files_null": put("ListDatasetFiles", datasetFiles=None, nextPageToken=None),
    "files_of_numbers": each("ListDatasetFiles", "datasetFiles", name=7),
    "files_without_build_id": put("ListDatasetFiles", datasetFiles=[{"name": "build_id.json"}]),
    "version_warning": put("CreateDatasetVersion", status="warning", error="Some tags were not saved"),
    "files_endless": put("ListDatasetFiles", nextPageToken="0"),
    "files_odd_dates": each("ListDatasetFiles", "datasetFiles", creationDate="today", totalBytes="x"),
    "build_id_400": refused("DownloadDataset", 400),
    "build_id_403": refused("DownloadDataset", 403),
    "build_id_404": refused("DownloadDataset", 404),
    "build_id_500": refused("DownloadDataset", 500),
    "kernel_no_metadata": without("GetKernel", "metadata"),
    "kernel_no_number": without("GetKernel", "metadata__currentVersionNumber"),
    "kernel_old_number": put("GetKernel", metadata__currentVersionNumber=1),
    "kernel_no_private": without("GetKernel", "metadata__isPrivate"),
    "kernel_null_private": put("GetKernel", metadata__isPrivate=None),
    "kernel_public": put("GetKernel", metadata__isPrivate=False),
    "kernel_odd_facts": put(
        "GetKernel", metadata__lastRunTime="soon", metadata__categoryIds=None, metadata__machineShape=3, blob=None
    ),
    "kernel_403": refused("GetKernel", 403),
    "kernel_500": refused("GetKernel", 500),
    "kernel_html": raw("GetKernel", HTML, kind=TEXT),
    "kernel_status_unknown": put("GetKernelSessionStatus", status="POSTPROCESSING"),
    "kernel_status_null": put("GetKernelSessionStatus", status=None, failureMessage=None),
    "kernel_status_number": put("GetKernelSessionStatus", status=3),
    "kernel_status_400_first": refused("GetKernelSessionStatus", 400, times=3),
    "kernel_status_403_first": refused("GetKernelSessionStatus", 403, times=3),
    "kernel_status_404_first": refused("GetKernelSessionStatus", 404, times=3),
    "kernel_status_403": refused("GetKernelSessionStatus", 403),
    "kernel_status_html_first": raw("GetKernelSessionStatus", HTML, kind=TEXT, times=3),
    "output_400_first": refused("ListKernelSessionOutput", 400, times=3),
    "output_404_first": refused("ListKernelSessionOutput", 404, times=3),
    "output_403": refused("ListKernelSessionOutput", 403),
    "output_endless": put("ListKernelSessionOutput", nextPageToken="0"),
    "output_null_files": put("ListKernelSessionOutput", files=None, nextPageToken=None),
    "log_lines": logged("the log is one piece a line", lambda pieces: "\n".join(map(json.dumps, pieces))),
    "log_prefixed": logged(
        "the log is plain, each line behind a time",
        lambda pieces: "".join(f"{piece['time']}s 1 {piece['data']}" for piece in pieces),
    ),
    "log_prefixed_lines": logged(
        "one piece a line behind a time",
        lambda pieces: "\n".join(f"{piece['time']}s {json.dumps(piece)}" for piece in pieces),
    ),
    "log_indented": logged("the log's list is indented", lambda pieces: json.dumps(pieces, indent=2)),
    "log_unclosed": logged("the log's list is not closed", lambda pieces: json.dumps(pieces)[:-1]),
    "log_cut_off": logged("the log ends inside its last piece", lambda pieces: json.dumps(pieces)[:-5]),
    "log_half_character": logged(
        "half of a character is in a piece",
        lambda pieces: json.dumps([{**pieces[0], "data": "progress \ud83d\n"}, *pieces]),
    ),
    "log_bad_escape": logged(
        "the log ends inside a piece with an escape that JSON does not know",
        lambda pieces: json.dumps(pieces)[:-1] + ',{"stream_name":"stdout","time":9,"data":"C:\\xpath and more',
    ),
    "log_halves": logged("the marker is in two pieces", _halves),
    "log_as_list": logged("the log is a list, not a text", lambda pieces: pieces),
    "log_odd_text": logged(
        "the log holds a progress bar",
        lambda pieces: json.dumps([{**pieces[0], "data": "100%|\u2588\u2588\u2588|\n"}, *pieces]),
    ),
}
