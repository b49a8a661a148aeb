"""No password of a URL is ever printed: not by config show, not by doctor, not in an error, not in a log."""

import json
import time
from urllib.parse import quote

import pytest
import structlog
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from expunge import doctor
from expunge.cli import run
from expunge.commands.common import unexpected
from expunge.errors import InputError
from expunge.families import preflight
from expunge.logs import configure, get_logger
from expunge.text import masked, masked_quote

NAMES = [
    *("password", "passwd", "pwd", "pass", "token", "secret", "key", "sig", "signature", "credential", "auth"),
    *("access_key", "api_key", "client_secret", "AWSAccessKeyId", "X-Amz-Signature", "X-Amz-Credential"),
    *("X-Amz-Security-Token", "X-Goog-Signature", "sslpassword", "PASSWORD", "pass%77ord", "odbc_connect"),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_secret_in_a_query(name: str) -> None:
    url = f"https://host:8080/a?region=eu&{name}=hunter2/+~%40&keyspace=b"
    assert masked(f"see {url} there") == f"see https://host:8080/a?region=eu&{name}=***&keyspace=b there"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql+psycopg://user:hun@ter/2@host/db", "postgresql+psycopg://user:***@host/db"),
        ("postgresql://user@server:hunter2@host/db", "postgresql://user@server:***@host/db"),
        ("redis://:hunter2@host", "redis://:***@host"),
        ("https://hf_hunter2@huggingface.co/x", "https://***@huggingface.co/x"),
        ("https://hunter2:x-oauth-basic@github.com", "https://***@github.com"),
        ("HTTPS://a:hunter2@host", "HTTPS://***@host"),
        ("AccountName=a;AccountKey=hunter2==;x=y", "AccountName=a;AccountKey=***"),
        ("host=h password='hunter 2' user=u", "host=h password=*** user=u"),
        ("{'password': 'hunter 2'}", "{'password': ***"),
        ("Authorization: Bearer hunter2hunter2", "Authorization: Bearer ***"),
        ("mssql://h?odbc_connect=DRIVER%3DA%3BPWD%3Dhunter2", "mssql://h?odbc_connect=***"),
        ("export AWS_SECRET_ACCESS_KEY=hunter2", "export AWS_SECRET_ACCESS_KEY=***"),
    ],
)
def test_a_secret_elsewhere(text: str, shown: str) -> None:
    assert masked(text) == shown
    assert masked(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://user@host/db",
        "http://127.0.0.1:8265 does not answer (a: b)",
        "use http://HOST:PORT",
        "abfs://container@account.dfs.core.windows.net/path",
        "sqlite:////srv/a@b/expunge.db",
        "write EDITOR:key=value,key=value",
        "blob_key: not base64",
        "the setting 'key' is given twice",
        "prompt_tokens=1 max_tokens=3 monkey=2 keyspace=3 tokenizer=x design=4 password=",
        "ask ops@example.org: it knows",
    ],
)
def test_what_holds_no_secret_is_left_alone(text: str) -> None:
    assert masked(text) == text


@pytest.mark.parametrize(
    "text",
    ["a" * 10**6, "://" * 3 * 10**5, "a=" * 5 * 10**5, "password='" * 10**5, "bearer " * 10**5, "@" * 10**6],
    ids=lambda text: text[:10],
)
def test_a_long_text_takes_no_longer_than_it_is_long(text: str) -> None:
    start = time.process_time()
    masked_quote(text)
    assert time.process_time() - start < 10  # what is quadratic takes hours


WORDS = ("Hunter2Aa", "Xylo9phone")


@st.composite
def passwords(draw: st.DrawFn) -> str:
    """Two words that nothing else holds, and any characters a variable can hold around them."""
    noise = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=4)
    a, b, c = draw(noise), draw(noise), draw(noise)
    return a + WORDS[0] + b + WORDS[1] + c


URLS = {
    "EXPUNGE_DATABASE_URL": [
        "postgresql+psycopg://user:{}@127.0.0.1:9/db",
        "postgresql://user:{}",
        "nothing://u:{}@127.0.0.1:9/db?password={}",
        "sqlite:////proc/none/x.db?password={}",
    ],
    "EXPUNGE_BLOB_URL": ["ftp://user:{}@127.0.0.1:9/blobs", "s3://k:{}@bucket/x", "nothing://host/x?token={}"],
    "EXPUNGE_TRACKING_URI": [
        "http://user:{}@127.0.0.1:9",
        "https://{}@127.0.0.1:9/x",
        "http://127.0.0.1:9/?token={}",
        "http://[{}",
        "postgresql://user:{}@127.0.0.1:9/mlflow",
    ],
    "EXPUNGE_RAY_ADDRESS": [
        "http://user:{}@127.0.0.1:9",
        "http://{}@127.0.0.1:9",
        "http://127.0.0.1:9/x?sig={}",
        "user:{}@127.0.0.1:9",
        "http://127.0.0.1:{}",
        "ray://user:{}@127.0.0.1:9",
    ],
    "RAY_API_SERVER_ADDRESS": ["http://user:{}@127.0.0.1:9", "http://127.0.0.1:{}@h"],
    "EXPUNGE_TRAINING__CHECKPOINT_URL": ["s3://key:{}@bucket/x", "s3://bucket/x?token={}"],
    "EXPUNGE_MODELS__OWN__SOURCE": ["https://user:{}@127.0.0.1:9/model", "https://127.0.0.1:9/model?access_token={}"],
}
CASES = [(variable, url) for variable, urls in URLS.items() for url in urls]


@pytest.mark.parametrize(("variable", "url"), CASES, ids=[f"{v}={u}" for v, u in CASES])
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(password=passwords(), encoded=st.booleans())
@example(password="/".join(WORDS), encoded=False)
@example(password="@".join(WORDS), encoded=False)
@example(password="p?#[]:&=%" + "'\"".join(WORDS), encoded=False)
@example(password=" ".join(WORDS), encoded=False)
@example(password="@/:".join(WORDS), encoded=True)
def test_no_password_of_a_setting_is_ever_printed(
    variable: str,
    url: str,
    password: str,
    encoded: bool,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name in doctor.INSTALLATION:  # they cost seconds, and read no URL
        monkeypatch.setitem(doctor.INSTALLATION, name, list)
    monkeypatch.setitem(doctor.LOOKS, "checkpoints", lambda _: "not looked at")
    monkeypatch.setattr("expunge.families.deep_preflight", lambda name, model, *_, **__: preflight(name, model))
    if "={}" in url:
        password = password.replace("&", "")  # it begins another option
    if "{}@" not in url:
        password = password.replace("@", "")  # it begins a host
    monkeypatch.setenv(variable, url.replace("{}", quote(password, safe="") if encoded else password))
    monkeypatch.setenv("EXPUNGE_LOG_LEVEL", "debug")
    capfd.readouterr()
    submit = ["submit", "--model", "own", "x.png"]
    for arguments in (["config", "show"], ["doctor"], ["list", "--json"], ["night"], submit):
        run(arguments)
        out, err = capfd.readouterr()
        for word in WORDS:
            assert word not in out + err, arguments


def test_an_error_masks_its_message_and_its_hint() -> None:
    error = InputError("bad http://a:hunter2@host", hint="use postgresql://u:hunter2@host")
    assert (error.message, error.hint) == ("bad http://***@host", "use postgresql://u:***@host")
    assert "hunter2" not in f"{error}{error!r}{error.args}"
    assert "hunter2" not in str(unexpected(RuntimeError("nonnumeric port: 'hunter2@host'")))


@pytest.fixture
def _logs() -> None:
    structlog.reset_defaults()
    configure("info")


@pytest.mark.usefixtures("_logs")
def test_logs_mask_too(capsys: pytest.CaptureFixture[str]) -> None:
    log = get_logger("batch")
    try:
        raise RuntimeError("lost http://a:hunter2@host")
    except RuntimeError as error:
        log.exception("failed", why=error, urls=["s3://k:hunter2@b"], more={"at": "redis://:hunter2@h", "reason": "r"})
    err = capsys.readouterr().err
    assert "hunter2" not in err
    line = json.loads(err)
    assert line["why"] == "lost http://***@host"
    assert line["more"] == {"at": "redis://:***@h", "reason": "[private]"}
    assert "RuntimeError: lost http://***@host" in line["exception"]
