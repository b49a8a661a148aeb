"""From a person's words to an accepted request; what is refused leaves nothing behind."""

import gzip
import json
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import pytest
from PIL import Image
from pydantic import BaseModel, ValidationError

from expunge.errors import InputError, StorageError, UnavailableError
from expunge.requests.blobs import MARKER, BlobStore
from expunge.requests.imaging import to_array
from expunge.requests.intake import accept
from expunge.requests.lines import LineResult, accept_jsonl
from expunge.requests.records import RequestRecord
from expunge.requests.store import RequestStore
from expunge.requests.submission import EditInput, Submission, parse_edit, validated
from expunge.settings import Settings, load_settings
from expunge.types import RemovalRequest, RequestState

Paint = Callable[[str], Path]
Take = Callable[..., tuple[RequestRecord, bool]]


@pytest.fixture
def take_by(settings: Settings, blobs: BlobStore, tmp_path: Path) -> Callable[[RequestStore], Take]:
    def by(store: RequestStore) -> Take:
        def call(**fields: object) -> tuple[RequestRecord, bool]:
            submission = validated(Submission, {"model": "flags", **fields})
            return accept(submission, settings=settings, store=store, blobs=blobs, base=tmp_path)

        return call

    return by


@pytest.fixture
def take(take_by: Callable[[RequestStore], Take], store: RequestStore) -> Take:
    return take_by(store)


@pytest.fixture
def lines(settings: Settings, store: RequestStore, blobs: BlobStore, tmp_path: Path) -> Callable[..., list[LineResult]]:
    def call(*written: str | bytes, max_line: int = 1000) -> list[LineResult]:
        file = tmp_path / "requests.jsonl"
        file.write_bytes(b"".join(line if isinstance(line, bytes) else line.encode() + b"\n" for line in written))
        return list(accept_jsonl(file, settings=settings, store=store, blobs=blobs, max_line=max_line))

    return call


def stored(folder: Path) -> int:
    return sum(path.is_file() and path.name != MARKER for path in (folder / "blobs").rglob("*"))


def test_accepted(take: Take, paint: Paint, blobs: BlobStore) -> None:
    for name in ("a.png", "b.jpg", "m.png"):
        paint(name)
    record, new = take(images=["a.png", "b.jpg"], prompt="a flag", edit="blend:strength=0.5,mask=m.png", priority=2)
    assert new
    request = record.request
    assert request.id.startswith("req-")
    assert request.external_id.startswith("sha256-")
    assert request.edit is not None
    assert request.edit.options == {"strength": "0.5"}
    for blob in (*request.images, request.edit.mask):
        assert blob is not None
        assert to_array(blobs.get(blob)).shape == (12, 16, 3)


def test_submitting_twice_is_submitting_once(take: Take, paint: Paint) -> None:
    paint("a.png")
    first, _ = take(images=["a.png"])
    again, new = take(images=["a.png"])
    assert (again, new) == (first, False)
    assert take(images=["a.png"], prompt="another")[1]
    assert take(images=["a.png"], model="faces")[1]


PATHS = {
    RequestState.ACCEPTED: [],
    RequestState.BATCHED: [RequestState.BATCHED],
    RequestState.FAILED: [RequestState.BATCHED, RequestState.FAILED],
    RequestState.NOT_REPRODUCED: [RequestState.BATCHED, RequestState.NOT_REPRODUCED],
    RequestState.REMOVED: [RequestState.BATCHED, RequestState.REMOVED],
}


@pytest.mark.parametrize("harm", ["gone", "damaged"])
@pytest.mark.parametrize("state", PATHS)
def test_submitting_again_repairs_lost_pictures(
    take: Take, paint: Paint, store: RequestStore, blobs: BlobStore, tmp_path: Path, state: RequestState, harm: str
) -> None:
    for name in ("a.png", "s.png"):
        paint(name)
    record, _ = take(images=["a.png"], surrogates=["s.png"])
    for step in PATHS[state]:
        store.transition(record.request.id, step)
    mine = (*record.request.images, *record.request.surrogates)
    for blob in mine:
        if harm == "gone":
            blobs.delete(blob)
        else:
            (tmp_path / "blobs" / blob[:2] / blob).write_bytes(b"damaged")
    again, new = take(images=["a.png"], surrogates=["s.png"])
    assert (again.request, again.state, new) == (record.request, state, False)
    for blob in mine:
        assert to_array(blobs.get(blob)).shape == (12, 16, 3)


def test_a_withdrawn_request_is_not_stored_again(
    take: Take, paint: Paint, store: RequestStore, blobs: BlobStore
) -> None:
    paint("a.png")
    record, _ = take(images=["a.png"])
    store.transition(record.request.id, RequestState.WITHDRAWN)
    blobs.delete(record.request.images[0])  # as a purge would
    assert not take(images=["a.png"])[1]
    assert not blobs.has(record.request.images[0])


def test_concurrent_duplicates_leave_the_pictures_of_the_one_that_is_accepted(
    take: Take, store: RequestStore, blobs: BlobStore, paint: Paint
) -> None:
    names = [f"{number}.png" for number in range(14)]
    for name in names:
        paint(name)
    together = threading.Barrier(len(names))

    def submit(name: str) -> RequestRecord | None:
        together.wait()
        try:
            return take(images=[name], external_id="ticket")[0]
        except InputError:
            return None

    with ThreadPoolExecutor(len(names)) as pool:
        accepted = [record for record in pool.map(submit, names) if record]
    (record,) = store.list()
    assert [known.request for known in accepted] == [record.request]
    assert blobs.ids() == list(record.request.images)


class _Refusing(RequestStore):
    """Between the pictures and the row, something happens."""

    def __init__(self, store: RequestStore, happens: Callable[[], None]) -> None:
        super().__init__(store.database, store.vault, load_settings().home, store.actor)
        self._happens = happens

    def add(self, request: RemovalRequest) -> tuple[RequestRecord, bool]:
        self._happens()
        return super().add(request)


def refuse(error: BaseException) -> Callable[[], None]:
    def happens() -> None:
        raise error

    return happens


@pytest.mark.parametrize("error", [UnavailableError("locked"), StorageError("disk full"), KeyboardInterrupt()])
def test_what_ends_between_the_pictures_and_the_row_leaves_no_picture(
    take_by: Callable[[RequestStore], Take], store: RequestStore, blobs: BlobStore, paint: Paint, error: BaseException
) -> None:
    for name in ("a.png", "b.png"):
        paint(name)
    keep = take_by(store)(images=["a.png"])[0].request.images[0]
    with pytest.raises(type(error), match=f"^{error}"):
        take_by(_Refusing(store, refuse(error)))(images=["a.png", "b.png"])
    assert blobs.ids() == [keep], "the picture of the other request stays"


def test_a_picture_that_another_request_brings_at_the_same_time_stays(
    take_by: Callable[[RequestStore], Take], store: RequestStore, blobs: BlobStore, paint: Paint
) -> None:
    paint("a.png")

    def other_is_accepted_and_mine_refused() -> None:
        take_by(store)(images=["a.png"], external_id="other")
        raise UnavailableError("locked")

    with pytest.raises(UnavailableError, match="locked"):
        take_by(_Refusing(store, other_is_accepted_and_mine_refused))(images=["a.png"], external_id="mine")
    (record,) = store.list()
    (image,) = record.request.images
    assert blobs.has(image)

    # The other way round: a refused request takes it back just before my row is there.
    take_by(_Refusing(store, lambda: blobs.delete(image)))(images=["a.png"], external_id="third")
    assert blobs.has(image)


def test_a_picture_stays_where_the_database_cannot_be_asked(
    take_by: Callable[[RequestStore], Take],
    store: RequestStore,
    blobs: BlobStore,
    paint: Paint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paint("a.png")

    def breaks() -> None:
        monkeypatch.setattr(RequestStore, "read", lambda self: refuse(UnavailableError("gone"))())
        raise UnavailableError("gone")

    with pytest.raises(UnavailableError, match="gone"):
        take_by(_Refusing(store, breaks))(images=["a.png"])
    assert len(blobs.ids()) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"images": ["none.png"]}, r"^images\[0\]: .*none\.png does not exist: check the path"),
        ({"images": ["a.png", "words.png"]}, r"^images\[1\]: .*words\.png is not an image of a known kind"),
        ({"images": ["a.png"], "surrogates": ["words.png"]}, r"^surrogates\[0\]: .*words\.png is not an image"),
        ({"images": ["a.png"], "edit": "blend:mask=words.png"}, r"^edit\.mask: .*words\.png is not an image"),
        (
            {"images": ["a.png"], "model": "nobody"},
            "^model: 'nobody' is not configured: use one of faces, flags, people",
        ),
        ({"images": []}, "^images: give at least 1"),
        ({"images": ["a.png"] * 65}, "^images: give at most 64"),
        ({"images": "a.png"}, r"^images: give a list, even of one"),
        ({"images": ["a.png"], "surrogates": ["a.png", "a.png"]}, "^2 surrogates for 1 images: give one for each"),
        ({"images": ["a.png"], "surrogates": ["a.png"], "edit": "blend"}, "^surrogates and edit exclude each other"),
        ({"images": ["a.png"], "priority": 11}, "^priority: Input should be less than or equal to 10"),
        ({"images": ["a.png"], "priority": True}, "^priority: Input should be a valid integer"),
        ({"images": ["a.png"], "priority": 1.0}, "^priority: Input should be a valid integer"),
        ({"images": ["a.png"], "priority": "5"}, "^priority: Input should be a valid integer"),
        ({"images": [1]}, r'^images\.0: give the path of a file in quotes: "a.png"'),
        ({"images": ["a.png"], "surrogates": "a.png"}, "^surrogates: give a list, even of one"),
        ({"images": ["a.png"], "prompt": 1}, "^prompt: Input should be a valid string"),
        ({"images": ["a.png"], "due": 20270131}, "^due: Input should be a valid date, written YYYY-MM-DD"),
        ({"images": ["a.png"], "due": "2127-01-31T00:00:00"}, "^due: Input should be a valid date, written"),
        ({"images": ["a.png"], "due": "2127-02-30"}, "^due: Input should be a valid date"),
        ({"images": ["a.png"], "due": True}, "^due: Input should be a valid date"),
        ({"images": ["a.png"], "due": "2020-01-31"}, "^due: 2020-01-31 is in the past: "),
        ({"images": ["a.png"], "external_id": "  "}, "^external_id: String should have 1 to 200 characters"),
        ({"images": ["a.png"], "surrogates": ["a.png"]}, r"^surrogates\[0\] is the same picture as images\[0\]: give"),
        ({"images": ["a.png"], "edit": {"editor": "x", "options": {"a": [1]}}}, r"^edit\.options\.a: Input should be"),
        ({"images": ["a.png"], "edit": "blend:mask=tall.png"}, r"^edit\.mask: 12 x 16 pixels do not fit images\[0\]"),
        ({"images": ["a.png"], "edit": "blend:mask=black.png"}, r"^edit\.mask: nothing is marked: white is what"),
        ({"images": ["a.png"], "due": "tomorrow"}, "^due: Input should be a valid date"),
        ({"images": ["a.png"], "external_id": "a\nb"}, "^external_id: it holds a control character: leave it out$"),
        ({"images": ["a.png"], "colour": 1}, "^colour: there is no such field: the fields are model, images"),
        ({"images": ["a.png"], "edit": {"editor": "x", "wait": 1}}, r"^edit"),
    ],
)
def test_refused_and_nothing_stored(
    take: Take, paint: Paint, store: RequestStore, tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    paint("a.png")
    (tmp_path / "words.png").write_text("these are words")
    Image.new("RGB", (12, 16), "white").save(tmp_path / "tall.png")
    Image.new("RGB", (16, 12), "black").save(tmp_path / "black.png")
    with pytest.raises(InputError, match=message) as caught:
        take(**fields)
    assert "\n" not in str(caught.value)
    assert store.list() == []
    assert stored(tmp_path) == 0


def test_conflict_stores_nothing(take: Take, paint: Paint, tmp_path: Path) -> None:
    paint("a.png")
    paint("b.png")
    take(images=["a.png"], external_id="ticket")
    with pytest.raises(InputError, match=r"^external_id: req-.* has it already, with another images: use a new"):
        take(images=["b.png"], external_id="ticket")
    assert stored(tmp_path) == 1


def test_an_id_has_one_form_however_it_is_typed(take: Take, paint: Paint) -> None:
    paint("a.png")
    composed, combining = "caf\u00e9", "cafe\u0301"
    first, new = take(images=["a.png"], external_id=f" {combining} ")
    assert new
    assert first.request.external_id == composed
    for again in (composed, combining, f"{composed} "):
        assert take(images=["a.png"], external_id=again) == (first, False)


@pytest.mark.parametrize("stored", ["caf\u00e9", "cafe\u0301", " spaced "])
def test_a_request_accepted_before_ids_had_one_form_is_found(
    take: Take, paint: Paint, store: RequestStore, stored: str
) -> None:
    paint("a.png")
    earlier, _ = take(images=["a.png"], external_id="other")
    store.add(earlier.request.model_copy(update={"id": "req-old", "external_id": stored}))
    found, new = take(images=["a.png"], external_id=stored)
    assert (found.request.id, new) == ("req-old", False)
    if not stored.startswith(" "):
        assert take(images=["a.png"], external_id="caf\u00e9")[0].request.id == "req-old"


def test_a_known_request_whose_day_has_passed_is_known(take: Take, paint: Paint, store: RequestStore) -> None:
    paint("a.png")
    earlier, _ = take(images=["a.png"], external_id="1")
    past = earlier.request.model_copy(update={"id": "req-old", "external_id": "2", "due": date(2020, 1, 31)})
    store.add(past)
    assert not take(images=["a.png"], external_id="2", due="2020-01-31")[1]


def test_today_is_not_past(take: Take, paint: Paint) -> None:
    paint("a.png")
    assert take(images=["a.png"], due=date.today().isoformat())[1]


def test_a_mask_may_have_another_scale(take: Take, paint: Paint, tmp_path: Path) -> None:
    paint("a.png")
    Image.new("RGB", (32, 24), "white").save(tmp_path / "mask.png")
    assert take(images=["a.png"], edit="blend:mask=mask.png")[1]


def test_options_may_be_numbers_and_truth_values(take: Take, paint: Paint) -> None:
    paint("a.png")
    edit = {"editor": "blend", "options": {"strength": 0.5, "match": False, "steps": 3, "mode": "soft"}}
    written = take(images=["a.png"], edit=edit)[0].request.edit
    assert written is not None
    assert written.options == {"strength": "0.5", "match": "false", "steps": "3", "mode": "soft"}


def test_a_check_refuses_a_new_request_and_is_not_asked_of_a_known_one(
    settings: Settings, store: RequestStore, blobs: BlobStore, paint: Paint, tmp_path: Path
) -> None:
    paint("a.png")
    submission = validated(Submission, {"model": "flags", "images": ["a.png"]})

    def refuse(request: RemovalRequest, sizes: tuple[tuple[int, int], ...]) -> None:
        assert sizes == ((16, 12),)
        raise InputError("not today")

    with pytest.raises(InputError, match="not today"):
        accept(submission, settings=settings, store=store, blobs=blobs, base=tmp_path, check=refuse)
    assert (store.list(), stored(tmp_path)) == ([], 0)
    accept(submission, settings=settings, store=store, blobs=blobs, base=tmp_path)
    assert not accept(submission, settings=settings, store=store, blobs=blobs, base=tmp_path, check=refuse)[1]


@pytest.mark.parametrize("kind", [Submission, EditInput, RemovalRequest])
def test_no_error_shows_what_a_person_sent(kind: type[BaseModel]) -> None:
    with pytest.raises(ValidationError, match="string") as caught:
        kind.model_validate({"model": ["a secret"], "editor": ["a secret"], "reason": ["a secret"]})
    assert "a secret" not in str(caught.value)


def test_budgets_come_from_the_settings(take: Take, paint: Paint, monkeypatch: pytest.MonkeyPatch) -> None:
    big = paint("a.png")
    big.write_bytes(big.read_bytes() + bytes(70_000_000))
    with pytest.raises(InputError, match=r"over the limit of 64,000,000: .*EXPUNGE_MAX_BYTES"):
        take(images=["a.png"])


def test_no_storage_no_row(take: Take, paint: Paint, store: RequestStore, tmp_path: Path) -> None:
    paint("a.png")
    (tmp_path / "blobs").write_text("in the way")
    with pytest.raises(StorageError, match="the blob store cannot"):
        take(images=["a.png"])
    assert store.list() == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("blend", EditInput(editor="blend")),
        ("blend:", EditInput(editor="blend")),
        (
            "inpaint:mask=m.png,strength=0.5",
            EditInput(editor="inpaint", mask=Path("m.png"), options={"strength": "0.5"}),
        ),
        (
            "tell:say=older, with a hat,seed=1",
            EditInput(editor="tell", options={"say": "older, with a hat", "seed": "1"}),
        ),
        ("tell:say=a=b:c", EditInput(editor="tell", options={"say": "a=b:c"})),
    ],
)
def test_edit(text: str, expected: EditInput) -> None:
    assert parse_edit(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "^edit.editor: use letters, digits, dot"),
        ("a b", "^edit.editor: use letters, digits, dot"),
        ("blend:fast", "^edit: option 1 is not key=value: write EDITOR:key=value"),
        ("blend:=1", "^edit: option 1 is not key=value"),
        ("blend:a=1,a=2", "^edit: option 2 is given twice"),
    ],
)
def test_malformed_edit(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_edit(text)


def test_good_lines_survive_bad_ones(lines: Callable[..., list[LineResult]], paint: Paint, store: RequestStore) -> None:
    paint("a.png")
    good = {"model": "flags", "images": ["a.png"], "external_id": "1"}
    results = lines(
        "\ufeff" + json.dumps(good),
        '{"model": "flags", "images": ["a.png"]',
        "",
        "[1, 2]",
        json.dumps({**good, "modell": "flags"}),
        json.dumps({**good, "priority": "high"}),
        json.dumps({**good, "model": "nobody"}),
        json.dumps({**good, "images": ["none.png"]}),
        "{" + '"a": 1, ' * 500 + "}",
        b'{"model": "fl\xffgs"}\n',
        '{"priority": ' + "1" * 900 + "}",
        json.dumps({**good, "reason": "\ud800"}),
        json.dumps(good),
        json.dumps({**good, "external_id": "2", "edit": {"editor": "blend", "options": {"a": "b"}}}),
        json.dumps({**good, "edit": {"editor": "blend", "options": {"\ud800": "x"}}}),
        json.dumps({**good, "edit": {"editor": "blend", "options": {"x": "\ud800"}}}),
        json.dumps({**good, "n" * 500: 1}),
    )
    told = {result.line: f"{result.error}: {result.hint}" for result in results if result.id is None}
    for line, message in {
        2: "column 39: not JSON (Expecting ',' delimiter): write one JSON object per line, e.g. {",
        4: "a JSON list, not an object: write one",
        5: "modell: there is no such field: the fields are",
        6: "priority: Input should be a valid integer",
        7: "model: 'nobody' is not configured: use one of faces, flags, people",
        8: "images[0]: ",
        9: "longer than 1,000 bytes: ",
        10: "column 14: not UTF-8: save the file as UTF-8",
        11: "model: Field required (and 2 more)",
        12: "reason: it is not text: a character in it is half of a pair",
        15: "edit.options.\ufffd",
        16: "edit.options.x: it is not text",
        17: f"{'n' * 50}...: there is no such field",
    }.items():
        assert told.pop(line).startswith(message)
    assert told == {}
    accepted = {result.line: result for result in results if result.id is not None}
    assert {line: result.new for line, result in accepted.items()} == {1: True, 13: False, 14: True}
    assert accepted[1].id == accepted[13].id
    assert len(store.list()) == 2


def test_deep_nesting_and_a_last_line_without_an_end(lines: Callable[..., list[LineResult]], paint: Paint) -> None:
    paint("a.png")
    deep = "[" * 200_000
    results = lines(deep, json.dumps({"model": "flags", "images": ["a.png"]}).encode(), max_line=300_000)
    assert results[0].error is not None
    assert results[0].error.startswith("nested too deeply")
    assert results[1].new


def test_paths_are_relative_to_the_file(
    lines: Callable[..., list[LineResult]], paint: Paint, monkeypatch: pytest.MonkeyPatch
) -> None:
    paint("a.png")
    monkeypatch.chdir("/")
    assert lines('{"model": "flags", "images": ["a.png"]}')[0].new


def test_storage_failure_ends_the_file_and_says_where(
    lines: Callable[..., list[LineResult]], paint: Paint, tmp_path: Path, store: RequestStore
) -> None:
    paint("a.png")
    (tmp_path / "blobs").write_text("in the way")
    with pytest.raises(StorageError, match=r"^line 2: the blob store cannot .*submit the file again"):
        lines("", '{"model": "flags", "images": ["a.png"]}')
    assert store.list(state=RequestState.ACCEPTED) == []


def test_no_file(settings: Settings, store: RequestStore, blobs: BlobStore, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^batch: .*none\.jsonl cannot be read \(no such file or directory\)"):
        list(accept_jsonl(tmp_path / "none.jsonl", settings=settings, store=store, blobs=blobs))
    with pytest.raises(InputError, match=r"^batch: .* cannot be read \(is a directory\)"):
        list(accept_jsonl(tmp_path, settings=settings, store=store, blobs=blobs))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_may_end_as_they_do_anywhere(lines: Callable[..., list[LineResult]], paint: Paint, end: str) -> None:
    paint("a.png")
    good = json.dumps({"model": "flags", "images": ["a.png"]})
    results = lines(f"{good}{end}{end}no json{end}{good}{end}{'x' * 2000}{end}{good}".encode())
    assert [(result.line, result.id is not None) for result in results] == [
        (1, True),
        (3, False),
        (4, True),
        (5, False),
        (6, True),
    ]
    assert results[-1].end == 3 * len(good) + 7 + 2000 + 5 * len(end)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"images": ["b.png"], "model": "flags", "images": ["a.png"]}', "'images' is given twice: keep one of them"),
        ('{"edit": {"editor": "blend", "options": {"a": "1", "a": "2"}}}', "'a' is given twice"),
        ('{"priority": NaN}', "NaN is not JSON: write a number"),
        ('{"priority": -Infinity}', "-Infinity is not JSON"),
        ('{"priority": 1e999}', "a number is too large"),
        ('{"priority": ' + "1" * 5000 + "}", "a number has too many digits"),
        ('"words"', "a JSON string, not an object"),
        ("12", "a JSON number, not an object"),
        ("true", "a JSON truth value, not an object"),
        ("null", "a JSON null, not an object"),
        ('[{"model": "flags"}]', "a JSON list, not an object: write one JSON object per line, .*jq -c"),
        ('{"model": "flags", "images": ["a.png"], "priority": true}', "priority: Input should be a valid integer"),
    ],
)
def test_what_json_would_lose_or_change_in_silence_is_refused(
    lines: Callable[..., list[LineResult]], paint: Paint, line: str, message: str
) -> None:
    paint("a.png")
    (result,) = lines(line, max_line=10_000)
    assert re.match(message, f"{result.error}: {result.hint}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[\n  {}\n]\n", "is a JSON list over several lines, not one request per line: write it as lines: `jq"),
        (b"{\r\n  }\r\n", "is a JSON object over several lines"),
        ('{"model": "flags"}\n'.encode("utf-16"), "is UTF-16 or UTF-32 text: save the file as UTF-8"),
        ('{"model": "flags"}\n'.encode("utf-16-le"), "is UTF-16 or UTF-32 text"),
        ('{"model": "flags"}\n'.encode("utf-32-be"), "is UTF-16 or UTF-32 text"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is not a text file: name a file with one JSON object per line"),
        (gzip.compress(b"{}\n"), "is not a text file"),
    ],
    ids=["list", "object", "UTF-16", "UTF-16 without a mark", "UTF-32", "picture", "gzip"],
)
def test_a_file_that_is_no_lines_of_json_is_refused_at_once(
    lines: Callable[..., list[LineResult]], content: bytes, message: str
) -> None:
    with pytest.raises(InputError, match=rf"^batch: .*requests\.jsonl {message}"):
        lines(content)


@pytest.mark.timeout(10)
def test_a_file_without_an_end_is_not_read(
    settings: Settings, store: RequestStore, blobs: BlobStore, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("pipe", "link"):
        with pytest.raises(InputError, match=rf"^batch: .*{name} is not a regular file: write the requests to a file"):
            list(accept_jsonl(tmp_path / name, settings=settings, store=store, blobs=blobs))
    with pytest.raises(InputError, match=r"^batch: .* is not a path"):
        list(accept_jsonl(tmp_path / "nul\0", settings=settings, store=store, blobs=blobs))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("reason", "x\x1b[31mremoved", "reason: it holds a control character"),
        ("external_id", "T-1\nT-2", "external_id: it holds a control character"),
        ("prompt", "a\x00b", "prompt: it holds a control character"),
        ("model", "no such/model", "model: use letters, digits, dot"),
    ],
)
def test_what_a_field_cannot_hold_is_said_in_words(field: str, value: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as refused:
        validated(Submission, {"model": "faces", "images": ["a.png"], field: value})
    assert "pattern" not in str(refused.value)
