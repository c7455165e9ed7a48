"""Personal data in a written table: what stands between ⟦ and ⟧ is personal, everything else is not."""

import pickle
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lifecycle_hf.curation import PIIRemover
from lifecycle_hf.curation.pii import TYPES, luhn, mod_97

KEY_BLOCK = "-----BEGIN {0}-----\nMIIEowIBAAKCAQEA0Z3VS5JJcds3xfn/ygWyF8PbnGy0AHB7\nq8B+Hn==\n-----END {0}-----"
PERSONAL = {
    "EMAIL": [
        "Write to ⟦anna.schmidt@uni-koeln.de⟧.",
        "from: J. Doe <⟦j_doe99@mail.example.com⟧>",
        "contact=⟦sales+eu@acme.io⟧&lang=en",
        "⟦o'brien@tcd.ie⟧ wrote back",
        "mailto:⟦First.Last@Sub.Domain.CO.UK⟧",
        "(⟦x@y.org⟧)",
        "adresse: ⟦jürgen@müller.de⟧, danke",
        "both ⟦a.b@c.fr⟧, ⟦d-e@f.com.br⟧; and more",
        "'⟦quoted@site.net⟧' is a string",
        "Is ⟦me@sub-domain.museum⟧?",
        "⟦user%queue@relay.edu⟧",
        "reply to ⟦1234567@qq.com⟧: it works",
    ],
    "IP": [
        "Connect to ⟦8.8.8.8⟧ first.",
        "⟦52.95.110.1⟧ - - [10/Oct/2023:13:55:36] GET /",
        "http://⟦93.184.216.34⟧:8080/x",
        "block ⟦185.220.101.0⟧/24 now",
        "client_ip=⟦203.0.112.9⟧",
        "ping (⟦1.1.1.1⟧)",
        "from ⟦2606:4700:4700::1111⟧ port 22",
        "Host [⟦2a00:1450:4001:81b::200e⟧]:443",
        "addr ⟦2001:4860:4860:0:0:0:0:8888⟧.",
        "Your IP address is ⟦77.111.247.12⟧, in Oslo.",
    ],
    "PHONE": [
        "Call ⟦(202) 555-0143⟧ today",
        "⟦202-555-0143⟧",
        "cell: ⟦415.555.2671⟧.",
        "⟦+1 (415) 555-2671⟧",
        "Reach us at ⟦1-800-356-9377⟧!",
        "⟦+12025550143⟧ is new",
        "my number 's ⟦718 555 0199⟧, ok",
        "London: ⟦+44 20 7946 0958⟧",
        "UK office ⟦+44 (0)20 7946 0958⟧",
        "mobile ⟦07700 900123⟧",
        "Manchester ⟦0161 496 0000⟧ (weekdays)",
        "⟦+49 151 12345678⟧",
        "Tel. ⟦030/1234567⟧",
        "Fax ⟦0049 30 901820⟧",
        "Paris ⟦01 42 68 53 00⟧",
        "⟦+33 6 12 34 56 78⟧ ou",
        "⟦+91 98765 43210⟧",
        "Tokyo ⟦03-3224-5000⟧",
        "Sydney ⟦(02) 9374 4000⟧",
        "whatsapp ⟦+5511912345678⟧",
        "phone: ⟦555-0143⟧",
        "Telephone number is ⟦2025550143⟧",
        "Zürich ⟦044 668 18 00⟧",
        "⟦+86 138 0013 8000⟧",
        "Madrid ⟦+34 912 345 678⟧.",
        "⟦+972-3-607-5000⟧",
        "oder ⟦+49 (0)171 / 23 45 678⟧ abends",
        "call ⟦+1.202.555.0123⟧ x12",
        "tel:⟦+4915112345678⟧",
        "Phone: ⟦202-555-0143⟧x123",
        "Tél : ⟦06.12.34.56.78⟧",
        "Roma ⟦+39 06 6982 1234⟧ ore 9",
        "Cell: ⟦5551234567⟧",
        "⟦(555) 123-4567⟧",
        "e:no,p:⟦202-555-0143⟧",
        "Москва ⟦8 (495) 123-45-67⟧",  # is missed: the trunk prefix 8
    ],
    "CREDIT_CARD": [
        "card ⟦4111 1111 1111 1111⟧ exp 12/25",
        "⟦4111111111111111⟧",
        "MC ⟦5500-0055-5555-5559⟧, thanks",
        "amex ⟦3782 822463 10005⟧",
        "⟦371449635398431⟧",
        "Discover: ⟦6011111111111117⟧.",
        "⟦3056 930902 5904⟧",
        "JCB ⟦3530111333300000⟧ 123",
        "pan=⟦2223003122003222⟧;",
    ],
    "IBAN": [
        "IBAN ⟦GB82 WEST 1234 5698 7654 32⟧ AND more",
        "⟦DE89370400440532013000⟧",
        "auf ⟦DE89 3704 0044 0532 0130 00⟧ überweisen",
        "⟦FR14 2004 1010 0505 0001 3M02 606⟧",
        "iban:⟦NL91ABNA0417164300⟧.",
        "⟦CH93-0076-2011-6238-5295-7⟧",
        "(⟦NO9386011117947⟧)",
        "⟦ES91 2100 0418 4502 0005 1332⟧",
    ],
    "SECRET": [
        "aws_access_key_id = ⟦AKIAIOSFODNN7EXAMPLE⟧",
        "token: ⟦ghp_16C7e42F292c6912E7710c838347Ae178B4a⟧",
        "SLACK='⟦xoxb-123456789012-1234567890123-AbCdEfGhIjKlMnOpQrStUvWx⟧'",
        "key=⟦AIzaSyDaGmWKa4JsXZ-HjGw7ISLn_3namBGewQe⟧",
        "OPENAI_API_KEY=⟦sk-proj-Ab3_dEf6hIj9-lMn2pQr5tUv8xYz1BcD4⟧",
        "⟦sk-4f9a1c7be2d84035a6f1c0de92b7a8e3⟧",
        "stripe ⟦sk_live_4eC39HqLyjWDarjtT1zdp7dc⟧",
        "Bearer ⟦eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P⟧",
        "HF_TOKEN=⟦hf_aBcDeFgHiJkLmNoPqRsTuVwXyZ12345678⟧",
        f"key:\n⟦{KEY_BLOCK.format('RSA PRIVATE KEY')}⟧\n",
        f"⟦{KEY_BLOCK.format('PRIVATE KEY')}⟧",
        "glpat: ⟦glpat-zY9xW8vU7tS6rQ5pO4nM⟧",
    ],
}  # fmt: skip
NOT_PERSONAL = [
    "user@localhost", "@property\ndef name(self):", "y = a @ b.T + c", "npm i lodash@4.17.21", "logo@2x.png",
    "git clone git@github.com:org/repo.git", "weights@x.to(device)", "follow @some.one on it", "a@b",
    "name@host.local", "systemctl start getty@tty1.service", "@scope/package@1.0.0", "an @ sign @ 5.00 each",
    "foo@bar.baz", "..@..", "x@@y.com@@z", "john at example dot com", "@media (max-width: 100px)", "version 10.2.3.4",
    "v1.2.3.4", "Chrome/90.0.4.93 Safari", "pip install torch==2.13.0.1", "127.0.0.1", "0.0.0.0", "192.168.1.20",
    "10.0.0.1/8", "255.255.255.0", "999.1.2.3", "1.2.3", "1.3.6.1.4.1.311", "section 8.4.2.1 says",
    "192.0.2.44 in the documentation", "std::vector<int>", "x[2024::2]", "00:1a:2b:3c:4d:5e", "2001:db8::1",
    "12:30:45", 'assembly version="4.0.30.1"', "release-8.1.2.3", "package-5.6.7.8.tar.gz", "fe80::1ff:fe23:4567:890a",
    "dead::beef", "2024-01-15 10:20:30", "01-02-2024", "15.03.2021", "+2024-01-15 a line of a diff", "20240115-123456",
    "02139-4307", "ISBN 978-0-306-40615-7", "ISBN 0-306-40615-2", "ISSN 2049-3630", "SSN 123-45-6789",
    "3.14159265358979", "Order 302-4418273-1189452", "order no. 1234567890", "1 234 567 890 people", "pages 200-300",
    "the years 1914-1918", "timestamp 1700000000", "-1234567890", "$202 555 0143", "100-200-3000",
    "matrix 234 567 8901 222", "+5 degrees",
    "300-400-5000 USD",  # is found: it has the shape of a number of North America
    "+300 000 000", "2023-2024 2025-2026", "phone booth 1234567 metres", "0x1234567890", "1,234,567,8901",
    "01 02 03 04 05 06 07", "0123 4567 8901 2345", "UTC+02:00", "id 202-555-0143-77", "f(1, 2, 3, 4)",
    "4111 1111 1111 1112", "4111111111111112", "1234567812345670", "0000000000000000", "0.4111111111111111",
    "a4111111111111111f", "4111-1111 1111-1111", "IMEI 356938035643809", "UPC 036000291452", "EAN 4006381333931",
    "GB82 WEST 1234 5698 7654 33", "DE89370400440532013001", "DE8937040044053201300", "XX82WEST12345698765432",
    "AB12 CDEF", "ES6 2015 MODULES 2016", "US64SVBKUS6S3300958879", "d41d8cd98f00b204e9800998ecf8427e",
    "da39a3ee5e6b4b0d3255bfef95601890afd80709", "sk-learn-contrib-estimators-2024",
    "ghp_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", "sk-xxxxxxxxxxxxxxxxxxxxxxxx", "AKIA is a prefix",
    "AKIAIOSFODNN7EXAMPLEX", "task-4f9a1c7be2d84035a6f1c0de92b7a8e3", "123e4567-e89b-12d3-a456-426614174000",
    KEY_BLOCK.format("PUBLIC KEY"), KEY_BLOCK.format("CERTIFICATE"), "eyJ is how base64 of { begins",
    "risk-free-20-year-bonds-of-2030", "AIza short",
]  # fmt: skip


def parsed(row):
    """The text of a row without its marks, and the places between them."""
    parts, spans, at = row.replace("⟧", "⟦").split("⟦"), [], 0
    for number, part in enumerate(parts):
        if number % 2:
            spans.append((at, at + len(part)))
        at += len(part)
    return "".join(parts), spans


def test_precision_and_recall_of_the_table():
    expected, texts = set(), []
    for kind, rows in PERSONAL.items():
        for row in rows:
            text, spans = parsed(row)
            expected |= {(len(texts), start, end, kind) for start, end in spans}
            texts.append(text)
    assert len(expected) >= 60 and len(NOT_PERSONAL) >= 60
    decisions = PIIRemover()([*texts, *NOT_PERSONAL])
    found = {(i, *span) for i, decision in enumerate(decisions) for span in decision.spans}
    wrong = [([*texts, *NOT_PERSONAL][i][start:end], kind) for i, start, end, kind in found - expected]
    missed = [(texts[i], kind) for i, _, _, kind in expected - found]
    right = len(found & expected)
    assert right / len(found) >= 0.98 and right / len(expected) >= 0.98, f"{wrong=}\n{missed=}"


@pytest.mark.parametrize("number", ["4539578763621486", "79927398713", "0", "18"])
def test_luhn_by_hand(number):
    """18: 8 + (2 · 1) = 10. 79927398713 is the example of the standard."""
    assert luhn(number)
    last = int(number[-1])
    assert not any(luhn(number[:-1] + str(digit)) for digit in range(10) if digit != last)


@given(st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", min_size=8, max_size=30))
@settings(max_examples=30, deadline=None)
def test_mod_97_accepts_one_pair_of_check_digits_in_97(body):
    """Check digits 98 − (number with 00) mod 97 make the number 1 mod 97."""
    number = int("".join(str("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ".index(c)) for c in f"{body}DE00"))
    right = 98 - number % 97
    assert [digits for digits in range(2, 99) if mod_97(f"DE{digits:02}{body}")] == [right]


PIECES = [parsed(row)[0] for rows in PERSONAL.values() for row in rows] + NOT_PERSONAL


@given(st.lists(st.sampled_from(PIECES) | st.text("0123456789+-. @a:()", max_size=30), max_size=6))
@settings(max_examples=50, deadline=None)
def test_spans_tell_what_the_tags_replace(parts):
    text = "\n".join(parts)
    (decision,) = PIIRemover()([text])
    built, at = "", 0
    for start, end, kind in decision.spans:
        assert at <= start < end
        built, at = f"{built}{text[at:start]}<{kind}>", end
    assert decision.kept and built + text[at:] == (text if decision.text is None else decision.text)


def test_types_and_tags():
    text = "a@b.com, 8.8.8.8"
    assert [decision.text for decision in PIIRemover(["IP"], tag="[{}]")([text, ""])] == ["a@b.com, [IP]", None]
    assert PIIRemover()([text])[0].text == "<EMAIL>, <IP>" and set(TYPES) == set(PERSONAL)
    for types in (["EMAILS"], "EMAIL"):
        with pytest.raises(ValueError, match="must be a list of SECRET, EMAIL, IBAN"):
            PIIRemover(types)
    block = pickle.loads(pickle.dumps(PIIRemover(["IP"])))
    assert block([text], urls=["https://x.org"], domains=["web"]) == PIIRemover(["IP"])([text])


@pytest.mark.parametrize("piece", ["word ", "a", "1", "a@", "eyJ", "-----BEGIN PRIVATE KEY-----", "2001:", "+1 202 "])
def test_the_time_grows_as_the_text(piece):
    text = piece * (1_000_000 // len(piece))
    start = time.process_time()
    PIIRemover()([text])
    assert time.process_time() - start < 5


def test_five_megabytes_take_seconds():
    text = " ".join(PIECES) * (5_000_000 // len(" ".join(PIECES)))
    start = time.process_time()
    assert len(PIIRemover()([text])[0].spans) > 10_000
    assert time.process_time() - start < 5
