"""A webhook hears of every promotion and rollback, whatever fails or is killed, and of nothing that did not happen."""

import hashlib
import hmac
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from expunge.batch import webhooks
from expunge.batch.plan import plan_night
from expunge.batch.registering import promote_version
from expunge.errors import InputError
from expunge.registry.tracking import Tracker
from expunge.requests.store import RequestStore
from expunge.runs.job import JobFolder
from expunge.settings import load_settings
from expunge.types import Evidence, ModelVersion
from tests.batch.versions import registered
from tests.cli.conftest import Command
from tests.registry.receiver import Receiver, receiving
from tests.registry.test_commands import night, request

__all__ = ["night"]

Night = Callable[..., ModelVersion]
SECRET = "0123456789abcdef-secret"


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    with receiving() as it:
        monkeypatch.setenv("EXPUNGE_WEBHOOKS__URL", it.url)
        monkeypatch.setenv("EXPUNGE_WEBHOOKS__SECRET", SECRET)
        monkeypatch.setattr(webhooks, "PAUSES_S", (0.0, 0.01, 0.02, 0.03))
        yield it


@pytest.fixture
def tracker(receiver: Receiver, empty_registry: Tracker) -> Tracker:
    """After `receiver`, so that the store of the same test knows that there is a webhook."""
    return empty_registry


def events(receiver: Receiver) -> list[tuple[str, str, str | None]]:
    """What the receiver has been told, each message once."""
    told = {json.loads(body)["id"]: json.loads(body) for _, body in receiver.got}
    return [(each["event"], each["version"], each["previous"]) for each in told.values()]


def is_signed(headers: dict[str, str], body: bytes, secret: str = SECRET) -> bool:
    """As the runbook tells a receiver to check it."""
    parts = dict(part.split("=", 1) for part in headers["Expunge-Signature"].split(","))
    expected = hmac.new(secret.encode(), f"{parts['t']}.".encode() + body, hashlib.sha256).hexdigest()
    return hmac.compare_digest(expected, parts["v1"]) and abs(time.time() - int(parts["t"])) < 300


def test_a_rollback_is_told_signed_and_in_ids_alone(
    receiver: Receiver, tracker: Tracker, night: Night, command: Command
) -> None:
    night(1, new="r-1")
    night(2, new="r-2")
    assert command("rollback", "flags", "--to", "1", "--accept-resurfacing").code == 0
    [(headers, body)] = receiver.got
    told = json.loads(body)
    assert told.keys() == {"id", "at", "event", "model", "version", "previous", "brought_back"}
    assert (told["event"], told["model"], told["version"], told["previous"]) == ("rollback", "flags", "1", "2")
    assert told["brought_back"] == ["r-2"]
    assert headers["Expunge-Delivery"] == told["id"]
    assert is_signed(headers, body)
    assert not is_signed(headers, body + b" ")
    assert not is_signed(headers, body, "another secret entirely")
    assert "personal" not in body.decode()
    assert load_settings().acting not in body.decode()


def test_a_server_that_fails_first_is_asked_again(
    receiver: Receiver, tracker: Tracker, night: Night, command: Command
) -> None:
    night(1, new="r-1", promoted=False)
    receiver.answers = [503, 500, 200]
    assert command("promote", "flags", "1", "--yes").code == 0
    assert len(receiver.got) == 3
    assert events(receiver) == [("promotion", "1", None)]
    assert len({headers["Expunge-Delivery"] for headers, _ in receiver.got}) == 1
    (listed,) = command("webhooks", "list", "--json").json
    assert (listed["attempts"], listed["error"], bool(listed["delivered"])) == (1, "", True)
    assert command("webhooks", "deliver", "--json").json == {"delivered": 0}


def test_what_is_not_taken_waits_in_order_and_a_promotion_does_not_fail_with_it(
    receiver: Receiver, tracker: Tracker, night: Night, command: Command
) -> None:
    night(1, new="r-1", promoted=False)
    night(2, new="r-2")
    receiver.answers = [500]
    assert command("promote", "flags", "1", "--yes", "--accept-resurfacing").code == 0
    assert command("rollback", "flags", "--to", "1").code == 0, "again: nothing changes, and nothing is told"
    assert command("promote", "flags", "2", "--yes", "--accept-resurfacing").code == 0
    ended = command("webhooks", "deliver")
    assert ended.code == 5
    assert "message 1 was not delivered (HTTP 500); 2 messages wait" in ended.err
    printed = command("webhooks", "list").out
    assert printed.count("HTTP 500") == 1, "the second waits behind the first"
    assert "waits" in printed
    receiver.answers, receiver.got = [200], []
    assert command("webhooks", "deliver").out == "delivered 2 messages\n"
    assert events(receiver) == [("promotion", "1", "2"), ("promotion", "2", "1")]


@pytest.mark.parametrize("answer", [301, 302, 307])
def test_no_redirect_is_followed(
    receiver: Receiver, tracker: Tracker, night: Night, command: Command, answer: int
) -> None:
    night(1, new="r-1", promoted=False)
    receiver.answers = [answer]
    command("promote", "flags", "1", "--yes")
    assert len(receiver.got) == len(webhooks.PAUSES_S)
    assert f"HTTP {answer}" in command("webhooks", "list").out


def test_a_server_that_never_ends_its_answer_holds_nothing_up(
    receiver: Receiver, tracker: Tracker, night: Night, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(webhooks, "PAUSES_S", (0.0,))
    night(1, new="r-1", promoted=False)
    receiver.trickles = True
    began = time.monotonic()
    assert command("promote", "flags", "1", "--yes").code == 0
    assert time.monotonic() - began < 8
    assert "timed out" in command("webhooks", "list").out


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_promotion_that_was_killed_is_told_if_it_happened(
    receiver: Receiver,
    tracker: Tracker,
    night: Night,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    after: bool,
) -> None:
    night(1, new="r-1", promoted=False)
    real = MlflowClient.set_registered_model_alias

    def killed(client: MlflowClient, name: str, alias: str, version: str) -> None:
        if after:
            real(client, name, alias, version)
        raise KeyboardInterrupt("killed")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", killed)
        assert command("promote", "flags", "1", "--yes").code == 130
    assert receiver.got == []
    assert "not replaced yet" in command("webhooks", "list").out
    assert command("webhooks", "deliver").code == 0
    assert events(receiver) == ([("promotion", "1", None)] if after else [])
    assert command("promote", "flags", "1", "--yes").code == 0
    assert events(receiver) == [("promotion", "1", None)], "once, whenever it was killed"


def test_a_nights_promotion_is_told_with_a_line_in_the_history_of_what_it_removes(
    receiver: Receiver, tracker: Tracker, store: RequestStore, make_evidence: Callable[..., Evidence], tmp_path: Path
) -> None:
    settings = load_settings()
    store.add(request("r-1"))
    (job,) = plan_night(store.drain("night-1"), settings, lambda model: (None, [])).jobs
    evidence = make_evidence(job, "r-1")
    folder = JobFolder(settings.runs / job.batch / job.id)
    folder.job.write(job)
    folder.evidence.write(evidence)
    folder.version.write(registered(job, evidence, tracker, tmp_path / "hotfix"))
    for _ in range(2):  # a second start changes nothing
        assert promote_version(folder, tracker, store)
    said = [event.detail for event in store.get("r-1").history]
    assert said.count("promotion of models:/flags/1 over no champion by its night") == 1
    webhooks.deliver_what_waits(settings, store, tracker)
    assert events(receiver) == [("promotion", "1", None)]
    assert len(receiver.got) == 1


def test_without_a_webhook_nothing_is_written(empty_registry: Tracker, command: Command, store: RequestStore) -> None:
    assert store.note([], "said", None) is None
    assert command("webhooks", "list", "--json").json == []
    ended = command("webhooks", "deliver")
    assert ended.code == 2
    assert "webhooks.url: no webhook is set" in ended.err


@pytest.mark.parametrize(
    ("url", "secret", "said"),
    [
        ("http://example.org/hook", SECRET, "use https://"),
        ("ftp://example.org/hook", SECRET, "use https://"),
        ("https://user:word@example.org/hook", SECRET, "credentials"),
        ("https://", SECRET, "names no host"),
        ("https://example.org/hook", "", "needs secret_file, or a secret"),
        ("https://example.org/hook", "short", "at least 16 characters"),
    ],
)
def test_a_webhook_is_private_and_signed_or_refused(
    monkeypatch: pytest.MonkeyPatch, url: str, secret: str, said: str
) -> None:
    monkeypatch.setenv("EXPUNGE_WEBHOOKS__URL", url)
    monkeypatch.setenv("EXPUNGE_WEBHOOKS__SECRET", secret)
    with pytest.raises(InputError, match="webhooks") as refused:
        load_settings()
    assert said in str(refused.value)
    assert "word" not in str(refused.value)


@pytest.mark.parametrize("content", [None, "short", f"{SECRET}\n"])
def test_the_secret_may_be_a_file(
    receiver: Receiver,
    tracker: Tracker,
    night: Night,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: str | None,
) -> None:
    file = tmp_path / "secret"
    if content is not None:
        file.write_text(content)
    monkeypatch.delenv("EXPUNGE_WEBHOOKS__SECRET")
    monkeypatch.setenv("EXPUNGE_WEBHOOKS__SECRET_FILE", str(file))
    night(1, new="r-1", promoted=False)
    assert command("promote", "flags", "1", "--yes").code == 0, "a promotion does not fail with its webhook"
    ended = command("webhooks", "deliver")
    if content == f"{SECRET}\n":
        assert is_signed(*receiver.got[0])
        assert ended.code == 0
    else:
        assert ended.code == 2
        assert "webhooks.secret_file" in ended.err


def test_the_secret_is_never_shown(receiver: Receiver, command: Command) -> None:
    assert SECRET not in command("config", "show").out + command("config", "show", "--json").out
