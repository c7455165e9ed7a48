"""The client of chat servers and the judge on it, against a stand-in on the loopback."""

import pytest
from chat_server import says

from lifecycle_hf.completions.judges import ServerJudge
from lifecycle_hf.completions.server import ChatServer


def requests(n):
    return [{"messages": [{"role": "user", "content": str(i)}]} for i in range(n)]


def test_answers_come_in_order_and_are_asked_for_once(stand_in, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret")
    stand_in.answer = lambda body, number: (200, says(body["messages"][0]["content"] * 2))
    options = {"api_key_variable": "SOME_KEY", "cache": tmp_path / "kept" / "answers.jsonl"}
    server = ChatServer(stand_in.url, "m", **options)
    assert [choice["message"]["content"] for choice in server.ask(requests(12))] == [str(i) * 2 for i in range(12)]
    assert server.tokens == {"prompt": 120, "completion": 12} and set(stand_in.keys) == {"Bearer secret"}
    assert all(body["model"] == "m" for body in stand_in.requests)
    with options["cache"].open("a") as file:
        file.write('{"key": "cut o')
    again = ChatServer(stand_in.url, "m", **options)
    assert [choice["message"]["content"] for choice in again.ask(requests(13))][-2:] == ["1111", "1212"]
    assert len(stand_in.requests) == 13 and "secret" not in options["cache"].read_text()


def test_passing_faults_are_tried_again_and_nothing_is_lost(stand_in, tmp_path):
    stand_in.answer = lambda body, number: (503, "busy") if number in (1, 3) else (200, says("A"))
    server = ChatServer(stand_in.url, "m", concurrency=1, cache=tmp_path / "a.jsonl")
    assert len(server.ask(requests(3))) == 3 and len(stand_in.requests) == 5
    stand_in.answer = lambda body, number: (200, says("A")) if number == 6 else (401, "no such key")
    with pytest.raises(ValueError, match=r"did not answer a request \(status 401: no such key\)"):
        server.ask(requests(6))
    assert len(stand_in.requests) <= 9  # a refusal is not tried again
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 4


def test_a_server_that_is_down_or_talks_nonsense_is_named(stand_in):
    stand_in.answer = lambda body, number: (200, {"choices": []})
    with pytest.raises(ValueError, match="answered without a choice"):
        ChatServer(stand_in.url, "m").ask(requests(1))
    stand_in.answer = lambda body, number: (200, "<html>")
    with pytest.raises(ValueError, match="JSONDecodeError"):
        ChatServer(stand_in.url, "m", retries=0).ask(requests(1))
    with pytest.raises(ValueError, match="127.0.0.1:9/v1/chat/completions did not answer .*ConnectError"):
        ChatServer("http://127.0.0.1:9/v1", "m", retries=0).ask(requests(1))


def test_a_judge_reads_log_probs_in_both_orders(stand_in):
    # in the first order A has 3/4 of the two, in the second B has 4/5
    def answer(body, number):
        first = "Answer A: good" in body["messages"][0]["content"]
        return 200, says("A", {"A": -0.5 + 1.0986123, "B": -0.5, "C": 0.0} if first else {" B": 1.3862944, " A": 0.0})

    stand_in.answer = answer
    judge = ServerJudge(ChatServer(stand_in.url, "m"))
    assert judge(["hello"], [("good", "bad")]) == [pytest.approx((0.75 + 0.8) / 2)]
    assert judge(["hello"], [("bad", "good")]) == [pytest.approx(1 - (0.75 + 0.8) / 2)]


def test_a_judge_without_log_probs_reads_the_letter_and_names_garbage(stand_in):
    stand_in.answer = lambda body, number: (200, says("A."))
    assert ServerJudge(ChatServer(stand_in.url, "m"))(["hello"], [("good", "bad")]) == [0.5]
    stand_in.answer = lambda body, number: (200, says("Both are nice"))
    with pytest.raises(ValueError, match="The judge 'm' answered 'Both are nice', neither 'A' nor 'B'"):
        ServerJudge(ChatServer(stand_in.url, "m"))(["hi"], [("good", "bad")])
