"""Replace personal data and secrets in documents by tags: e-mail, IP, phone, credit card, IBAN, secret.

A type is a pattern of the shape and a check of the number that stands there and of what stands around it. Names and
postal addresses need a model that marks them, and are not found.
"""

import ipaddress
import re
from collections.abc import Callable, Sequence
from functools import cache, lru_cache

from lifecycle_hf.curation.decisions import Decision

_AROUND = 32
"""Characters before and after a match that its check may read."""
_CARD_DIGITS = re.compile(
    r"4\d{15}(?:\d{3})?|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}|3[47]\d{13}"
    r"|3(?:0[0-5]|[68]\d)\d{11}|(?:6011|65\d\d|64[4-9]\d|35(?:2[89]|[3-8]\d)|62\d\d)\d{12}"
)
"""Numbers of Visa, Mastercard, American Express, Diners Club, Discover, JCB and UnionPay."""
_IBAN_LENGTHS = {
    15: "NO", 16: "BE", 18: "DK|FI|FK|FO|GL|NL|SD", 19: "MK|SI", 20: "AT|BA|EE|KZ|LT|LU|MN|XK", 21: "CH|CR|HR|LI|LV",
    22: "BG|BH|DE|GB|GE|IE|ME|RS|VA", 23: "AE|GI|IL|IQ|OM|SO|TL", 24: "AD|CZ|ES|MD|PK|RO|SA|SE|SK|ST|TN|VG",
    25: "LY|PT", 26: "IS|TR", 27: "BI|DJ|FR|GR|IT|MC|MR|SM", 28: "AL|AZ|BY|CY|DO|GT|HU|LB|NI|PL|SV",
    29: "BR|EG|PS|QA|UA", 30: "JO|KW|MU|YE", 31: "MT|SC", 32: "LC", 33: "RU",
}  # fmt: skip
"""Countries by the number of characters of their IBANs (registry of ISO 13616)."""
_COUNTRY_CODE = re.compile(
    r"2(?:[07]|[1-689]\d)|3(?:[0-469]|[578]\d)|4(?:[013-9]|2\d)|5(?:[1-8]|[09]\d)|6(?:[0-6]|[789]\d)|7"
    r"|8(?:[1246]|[0589]\d)|9(?:[0-58]|[679]\d)"
)
"""Country codes of ITU-T E.164 without that of North America, 1."""
_NORTH_AMERICAN = re.compile(r"1?[2-9]\d\d[2-9]\d{6}")
_BEFORE_VERSION = re.compile(
    r"(?:\b(?:v|ver|versions?|releases?|build|firmware|section|chapter|clause|oid)\W{0,3}|[<>=~!]=|[~^]>?|\w[-/])$",
    re.I,
)
_BEFORE_PHONE = re.compile(
    r"\b(?:tel|tele(?:phone|fon)|phone|mobile|cell(?: ?phone|(?=:))|fax|whatsapp|(?:call|reach) (?:me|us))\b"
    r"[^\w\n]{0,3}(?:(?:number|no|nr|at|on|is)\b[^\w\n]{0,3}){0,2}$", re.I,
)  # fmt: skip
_NO_PHONE = re.compile(
    r"\+?(?:19|20)\d\d[-./ ][01]\d[-./ ][0-3]\d|\d\d[-./ ](?:\d\d[-./ ])?(?:19|20)\d\d(?!\d)|\d{5}-\d{4}$"
)
"""Dates and ZIP codes."""


def luhn(digits: str) -> bool:
    """Return whether a number ends in its check digit.

    Every second digit from the right is doubled. The sum of all digits then is a multiple of 10.

    Reference: ISO/IEC 7812-1, annex B.
    """
    doubled = sum(sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (doubled + sum(map(int, digits[::-2]))) % 10 == 0


def mod_97(iban: str) -> bool:
    """Return whether an IBAN is 1 modulo 97, read with its first four characters at the end and A … Z as 10 … 35.

    Reference: ISO 13616, ISO 7064.
    """
    return int("".join(str(int(character, 36)) for character in iban[4:] + iban[:4])) % 97 == 1


def _digits(text: str) -> str:
    return re.sub(r"\D", "", text)


def _is_secret(found: str, before: str, after: str) -> bool:
    """Return whether a key begins where a word does and is no placeholder such as `ghp_xxxx…`."""
    return not re.search(r"\w$", before) and len(set(found)) >= 12


def _is_email(found: str, before: str, after: str) -> bool:
    """Return whether the domain ends in a public suffix, and neither a path (`git@host:path`) nor a call follows."""
    local, domain = found.rsplit("@", 1)
    return ".." not in local and not re.match(r"[(\[]|:[\w~/]", after) and _is_domain(domain.lower())


@cache
def _suffixes():
    from tldextract import TLDExtract

    return TLDExtract(suffix_list_urls=(), cache_dir=None)  # the list in the package; nothing is fetched or written


@lru_cache(maxsize=1 << 14)
def _is_domain(name: str) -> bool:
    known = _suffixes()(name)
    return bool(known.suffix and known.domain)


def _is_iban(found: str, before: str, after: str) -> bool:
    return mod_97(re.sub(r"[ -]", "", found))


def _is_card(found: str, before: str, after: str) -> bool:
    digits = _digits(found)
    return bool(_CARD_DIGITS.fullmatch(digits)) and luhn(digits)


def _is_ip(found: str, before: str, after: str) -> bool:
    """Return whether an address is global: private ones and those of documentation tell nothing of a person.

    A version number has the shape of an IPv4 address, and `2024::2` that of an IPv6 address.
    """
    try:
        address = ipaddress.ip_address(found)
    except ValueError:
        return False
    if address.version == 6:
        return address.is_global and sum(map(bool, found.split(":"))) > 2
    return address.is_global and not _BEFORE_VERSION.search(before)


def _is_phone(found: str, before: str, after: str) -> bool:
    """Return whether a number has a country code of E.164, or is a national one of North America or with a 0 first.

    Dates, ZIP codes and numbers in a row of numbers have these shapes too.
    """
    digits = _digits(found)
    if _NO_PHONE.match(found) or re.search(r"\d[ .-]$", before) or re.match(r"[ .-]\d\d", after):
        return False
    if found.startswith(("+", "00")):
        number = digits.removeprefix("00")
        known = _COUNTRY_CODE.match(number) or _NORTH_AMERICAN.fullmatch(number)
        return bool(known) and 8 <= len(number) <= 15 and len(set(number)) > 2
    american = _NORTH_AMERICAN.fullmatch(digits) or re.match(r"\([2-9]", found)
    return bool(american) or (digits[0] == "0" and 9 <= len(digits) <= 12)


def _follows_a_phone_word(found: str, before: str, after: str) -> bool:
    return 7 <= len(_digits(found)) <= 15 and bool(_BEFORE_PHONE.search(before))


def _iban_shapes() -> str:
    """Return the pattern of IBANs: a country, two digits, and as many characters more as the country's IBANs have."""
    tails = (rf"(?<=(?:{codes})\d\d)(?:[\ -]?[A-Z0-9]){{{n - 4}}}" for n, codes in _IBAN_LENGTHS.items())
    return rf"[A-Z]{{2}}\d\d(?<!\w....)(?:{'|'.join(tails)})(?!\w)"


# Runs in these patterns are bounded, or begin only where a run of their characters does: the time grows as the length
# of the text. Those that begin with a character, and look behind it after that, are the faster ones.
_SECRETS = r"""
    A(?:KI|SI)A[A-Z2-7]{16}(?!\w) | gh[pousr]_[A-Za-z0-9]{36,255} | github_pat_\w{22,255} | glpat-[\w-]{20,64}
  | xox[abeprs]-[\w-]{10,255} | hooks\.slack\.com/services/T\w{8,12}/B\w{8,12}/\w{20,30} | AIza[\w-]{35}(?![\w-])
  | sk-(?:(?:ant|proj|svcacct|admin)-[\w-]{20,255} | [A-Za-z0-9]{20,255}) | [rs]k_(?:live|test)_[A-Za-z0-9]{16,255}
  | hf_[A-Za-z0-9]{34}(?!\w) | npm_[A-Za-z0-9]{36}(?!\w) | eyJ(?<![\w-]eyJ)[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}
  | -----BEGIN\ (?:[A-Z]+\ ){0,2}PRIVATE\ KEY(?:\ BLOCK)?-----(?:[^-]|-(?!----))*+-----END\ [A-Z\ ]{11,40}-----
"""
_EMAIL = r"""
    (?<![\w.+%-]) \w[\w.+%'-]{0,63} @ (?:\w(?:[\w-]{0,61}\w)?\.){1,8} (?:[^\W\d_]{2,24} | xn--[\w-]{2,59})
    (?![\w@-]|\.\w)
"""
_CARD = r"""
    \d(?<![\w+.-]\d) (?:\d{3}([\ -]?)\d{4}\1\d{4}\1\d{4} | \d{3}([\ -])\d{6}\2\d{4,5} | \d{13,18}) (?![\w-]|\.\d)
"""
_IP = r"""
    \d(?<![\w.]\d)(?:
      \d{0,2}(?:\.\d{1,3}){3} (?!\w|\.\w|-[A-Za-z])
    | (?<=[23])(?<![0-9A-Fa-f]:\d)[0-9A-Fa-f]{3}(?:::?[0-9A-Fa-f]{1,4}){1,7} (?!\w|:[\w:])
    )
"""
_PHONE = r"""
    (?<![\w+.$/-])(?:
      \+[2-9]\d{0,2} GAP? (?:\(0\)GAP?)? \(?\d{1,12}\)? (?:GAP{1,3}\d{2,8}){0,5}    # +44 (0)20 7946 0958
    | 00 GAP? [2-9]\d{0,2} GAP (?:\(0\))? \(?\d{1,5}\)? (?:GAP\d{2,8}){1,5}          # 0049 30 123456
    | (?:\+?1GAP?)? (?:\(\d{3}\)GAP? | \d{3}GAP) \d{3} GAP \d{4} | \+1\d{10}         # (202) 555-0143
    | 0[1-9] (?:GAP\d\d){4}                                                          # 01 23 45 67 89
    | \(?0[1-9]\)? [\ -]\d{4}[\ -]\d{4}                                              # (02) 9374 4000
    | \(?0[1-9]\d{1,3}\)? [\ /-]\d{2,8} (?:[\ -]\d{2,6}){0,3}                        # 0161 496 0000
    )(?:(?=x\d)|(?!\w|[.-]\d))
""".replace("GAP", r"[\ \u00a0.\-\u2011/]")
_NUMBER = r"\d(?<![\w.]\d)(?=[\d() .\-/]{6}) \d{1,14}\)? (?:[\ .\-/]\d{2,12}){0,4} (?!\w)"
_MARKS = {
    "EMAIL": ["@"],
    "SECRET": ["AKIA", "ASIA", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "xox", "hooks.slack",
               "AIza", "sk-", "k_live_", "k_test_", "hf_", "npm_", "eyJ", "PRIVATE KEY"],
}  # fmt: skip
"""Strings of which a text with a match has one at least; they are found faster than the pattern."""
Check = Callable[[str, str, str], bool]
_DETECTORS: list[tuple[str, re.Pattern, Check]] = [
    (kind, re.compile(pattern, re.VERBOSE), check)
    for kind, pattern, check in (
        ("SECRET", _SECRETS, _is_secret),
        ("EMAIL", _EMAIL, _is_email),
        ("IBAN", _iban_shapes(), _is_iban),
        ("CREDIT_CARD", _CARD, _is_card),
        ("IP", _IP, _is_ip),
        ("PHONE", _PHONE, _is_phone),
        ("PHONE", _NUMBER, _follows_a_phone_word),
    )
]
"""Types with a pattern and a check of (match, text before it, text after it). Where two overlap, the first counts."""
TYPES = tuple(dict.fromkeys(kind for kind, *_ in _DETECTORS))


class PIIRemover:
    """Replace personal data and secrets by the tag of their type.

    - EMAIL: an address whose domain ends in a public suffix.
    - IP: global IPv4 and IPv6 addresses. Four numbers with dots after "version", "v", "==" and the like are none.
    - PHONE: international numbers, national ones of North America and with a 0 first; other numbers of 7 to 15 digits
      after a word such as "phone".
    - CREDIT_CARD: numbers of the large brands with a right check digit (`luhn`).
    - IBAN: of the length of its country, with right check digits (`mod_97`).
    - SECRET: keys of AWS, GitHub, GitLab, Google, Hugging Face, npm, OpenAI, Anthropic, Slack and Stripe, JSON web
      tokens, and blocks of private keys.

    Args:
        types: what to replace, of `TYPES`.
        tag: the tag with "{}" in place of the type.

    Raises:
        ValueError: there is no such type.
    """

    name = "pii"

    def __init__(self, types: Sequence[str] = TYPES, tag: str = "<{}>"):
        unknown = set(types) - set(TYPES)
        if unknown or isinstance(types, str):
            raise ValueError(f"PIIRemover: {types=} must be a list of {', '.join(TYPES)}.")
        self.types, self.tag = tuple(types), tag

    def __call__(self, texts: Sequence[str], *, urls=None, domains=None) -> list[Decision]:
        """Return for each text its text with tags, if it has any, and the spans that they replace, by type."""
        return [self._decide(text) for text in texts]

    def _decide(self, text: str) -> Decision:
        spans, taken = [], bytearray(len(text))
        for kind, pattern, check in _DETECTORS:
            if kind not in self.types or not any(mark in text for mark in _MARKS.get(kind, [""])):
                continue
            for match in pattern.finditer(text):
                start, end = match.span()
                around = text[max(0, start - _AROUND) : start], text[end : end + _AROUND]
                if taken.find(1, start, end) < 0 and check(match[0], *around):
                    spans.append((start, end, kind))
                    taken[start:end] = b"\1" * (end - start)
        if not spans:
            return Decision()
        spans.sort()
        starts = [0, *(end for _, end, _ in spans)]
        kept = [text[at:start] + self.tag.format(kind) for at, (start, _, kind) in zip(starts, spans)]
        return Decision(text="".join(kept) + text[starts[-1] :], spans=tuple(spans))
