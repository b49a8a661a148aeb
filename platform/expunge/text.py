"""Make text safe to show: no passwords, and nothing that controls the terminal or misleads the reader."""

import re
from urllib.parse import unquote_plus

# A URL's credentials end at its last @: a password may hold any character except white space.
_WORD = re.compile(r"\S+")
_NAME = re.compile(r"""(?<![\w.%-])([\w.%-]{1,80})(?:["']\s?:\s?(?=["'])|["']?\s?(?:=|%3D)\s?)""", re.IGNORECASE)
_VALUE = re.compile(r"""(?:"[^"]*"|'[^']*')?[^\s&]*""")
_HEADER = re.compile(
    r"""(\bauthorization["']?\s*[:=]\s*["']?(?:\w+\s+)?+|\bbearer\s+(?=\S*\d))[^\s"']{4,}""", re.IGNORECASE
)
_SECRET = re.compile(
    r"(?:pass(?:word|wd|phrase)|pwd|token|secret|signature|credentials?|authorization|jwt|odbc_connect"
    r"|(?:api|access|account|secret|shared|private)key(?:id)?|access[-_.]key[-_.]id|[-_.](?:key|sig|pass|auth|sas))$"
)
_SECRET_IN_QUERY = frozenset({"key", "sig", "pass", "auth", "sas", "code"})
_STARS = "***"


def masked(text: str) -> str:
    """Mask the passwords, tokens and keys in URLs, query strings, connection strings and headers.

    A user name stays (`postgresql://user:***@host`), except in http(s) URLs, where it may be a token.
    """
    return _HEADER.sub(rf"\1{_STARS}", _values(_WORD.sub(_userinfo, text)))


def masked_quote(text: str) -> str:
    """Mask text from another library, which may quote parts of a URL: the word before any @ is masked, too."""
    return _WORD.sub(lambda word: re.sub(r"^.*@", f"{_STARS}@", word.group()), masked(text))


def counted(number: int, noun: str) -> str:
    """Return the number with its noun, such as "1 picture" or "1,200 pictures"."""
    return f"{number:,} {noun if number == 1 else noun + 's'}"


def visible(text: str) -> str:
    """Return `text` on one line, with control and bidi characters and lone surrogates as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c in "\n\r\t" else _escape(c) for c in text)


def _userinfo(found: re.Match[str]) -> str:
    before, slashes, rest = found.group().partition("://")
    who, at, host = rest.rpartition("@")
    user, colon, _ = who.partition(":")
    if before.lower().endswith(("http", "https")) and at:
        return f"{before}{slashes}{_STARS}@{host}"
    return f"{before}{slashes}{user}:{_STARS}@{host}" if colon else found.group()


def _values(text: str) -> str:
    parts, end = [], 0
    for found in _NAME.finditer(text):
        if found.start() >= end and _is_secret(text, found):
            value = _VALUE.match(text, found.end())
            if value and value.group():
                parts += [text[end : found.end()], _STARS]
                end = value.end()
    return "".join((*parts, text[end:]))


def _is_secret(text: str, found: re.Match[str]) -> bool:
    name = unquote_plus(found[1]).lower()
    in_query = text[found.start() - 1 : found.start()] in ("?", "&", ";", "#")
    return bool(_SECRET.search(name)) or (in_query and name in _SECRET_IN_QUERY)


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
