"""Code submissions: a finished kernel version is handed in, scored, and counted against the daily limit."""

from __future__ import annotations

from .state import KernelVersion, Submission, find
from .world import Body, Refusal, Silence, World, now


def create(world: World, body: Body) -> Body:
    """Hand in one output file of one kernel version."""
    competition, ref = body.get("competitionName", ""), f"{body.get('kernelOwner', '')}/{body.get('kernelSlug', '')}"
    if competition not in world.settings.competitions:
        raise Refusal(404, "Not found")
    if world.has("submission_refused"):
        raise Refusal(400, "Submission not allowed: you have not accepted the rules of this competition")
    if world.has("submission_refused_503"):
        raise Refusal(503, "Service Unavailable")
    number, name = body.get("kernelVersion") or 0, body.get("fileName") or ""
    _submittable(world, ref, number, name)
    if _used(world, competition) >= world.settings.daily_limit:
        raise Refusal(400, "Submission not allowed: your team has used its daily submission allowance")
    submission = Submission(
        500_001 + len(world.state.submissions),
        competition,
        ref,
        number,
        name,
        body.get("submissionDescription", ""),
        now(),
    )
    world.state.submissions.append(submission)
    if world.has("submission_answer_lost"):
        raise Refusal(503, "Service Unavailable")
    if world.has("submission_silent"):
        raise Silence
    return {"message": "Successfully submitted to HuBMAP + HPA", "ref": submission.ref}


def _submittable(world: World, ref: str, number: int, name: str) -> KernelVersion:
    """The version to hand in. Refusal unless it is finished, offline, and has the file."""
    kernel = world.state.kernels.get(ref)
    if kernel is None or not 0 < number <= len(kernel.versions):
        raise Refusal(404, "Not found")
    version = kernel.versions[number - 1]
    if version.status != "COMPLETE":
        raise Refusal(400, "Submission not allowed: the notebook version has not finished running")
    if version.internet:
        raise Refusal(400, "Submission not allowed: internet access must be disabled in this competition's notebooks")
    if not name or find(version.files, name) is None:
        raise Refusal(400, "Submission not allowed: the notebook version has no such output file")
    return version


def _used(world: World, competition: str) -> int:
    today = now()[:10]
    return sum(one.competition == competition and one.date.startswith(today) for one in world.state.submissions)


def limits(world: World, body: Body) -> Body:
    """Submissions made today and still allowed."""
    used = _used(world, body.get("competitionName", ""))
    total = sum(one.competition == body.get("competitionName", "") for one in world.state.submissions)
    return {
        "numToday": used,
        "numTotal": total,
        "numAllowedNow": max(0, world.settings.daily_limit - used),
        "limitedByTotal": False,
    }


def get(world: World, body: Body) -> Body:
    """One submission; each call moves its scoring one step on."""
    found = next((one for one in world.state.submissions if one.ref == body.get("ref")), None)
    if found is None or (world.has("submission_unknown") and found is world.state.submissions[0]):
        raise Refusal(404, "Not found")
    return _shown(world, found)


def list_all(world: World, body: Body) -> Body:
    """All submissions of a competition, the newest first."""
    chosen = [one for one in reversed(world.state.submissions) if one.competition == body.get("competitionName")]
    return {"submissions": [_shown(world, one) for one in chosen], "nextPageToken": ""}


def _shown(world: World, one: Submission) -> Body:
    one.polls += 1
    if one.polls > world.settings.polls_until_scored and one.status == "PENDING":
        if world.has("submission_error"):
            one.status, one.error = "ERROR", "Submission Scoring Error: Your submission could not be scored"
        else:
            one.status, one.public_score, one.private_score = (
                "COMPLETE",
                world.settings.public_score,
                world.settings.private_score,
            )
    return {
        "ref": one.ref,
        "date": one.date,
        "description": one.message,
        "fileName": one.file,
        "status": one.status,
        "submittedBy": world.owner,
        "submittedByRef": world.owner,
        "teamName": world.owner,
        "publicScore": one.public_score,
        "privateScore": one.private_score,
        "errorDescription": one.error,
        "url": f"https://www.kaggle.com/submissions/{one.ref}",
    }


SERVICE = "competitions.CompetitionApiService/"
METHODS = {
    SERVICE + "CreateCodeSubmission": create,
    SERVICE + "GetSubmissionLimits": limits,
    SERVICE + "GetSubmission": get,
    SERVICE + "ListSubmissions": list_all,
}
